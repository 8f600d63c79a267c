"""Training passes that are recorded: bit for bit what the same cells give without, and never out of date."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast_network
from conftest import vary_kernels
from genotypes import NAMED, SEARCH_SPACES
from kernels import recorded
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network

pytestmark = pytest.mark.skipif(
    not fast_network.serves(torch.zeros(1)), reason="no C++ compiler here, or another backend is asked for"
)


def make(name="DARTS", kind=NetworkCIFAR, auxiliary=False, drop_path_prob=0.0):
    torch.manual_seed(0)
    net = vary_kernels(kind(4, 5, 4 if auxiliary else 3, auxiliary, NAMED[name]).double())
    net.drop_path_prob = drop_path_prob
    return net.to(memory_format=torch.channels_last)


def make_supernet(space="involution", drop_path_prob=0.0, **options):
    torch.manual_seed(0)
    primitives = [p for p in SEARCH_SPACES[space] if p != "sep_invo_7x7"]
    net = vary_kernels(Network(4, 5, 3, nn.CrossEntropyLoss(), primitives=primitives, **options).double())
    with torch.no_grad():
        for alpha in net.arch_parameters():
            alpha.normal_()
    net.drop_path_prob = drop_path_prob
    return net


def batch(N=3, size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(N, 3, size, size, generator=generator).double()
    return images.to(memory_format=torch.channels_last), torch.arange(N) % 5


def loss_of(net, images, target):
    output = net(images)
    if isinstance(output, torch.Tensor):
        return F.cross_entropy(output, target)
    logits, logits_aux = output
    loss = F.cross_entropy(logits, target)
    return loss if logits_aux is None else loss + 0.4 * F.cross_entropy(logits_aux, target)


def tensors_of(net):
    """Copies of all that a step changes, None for a gradient that is not there."""
    weights = [*net.parameters(), *(net.arch_parameters() if isinstance(net, Network) else ())]
    grads = [None if w.grad is None else w.grad.clone() for w in weights]
    return [x.detach().clone() for x in net.state_dict().values()] + grads


def assert_same(ones, others):
    for one, other in zip(ones, others, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


def unrecorded(function, *args):
    """The function's result, computed by the same cells without programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_network, "_train", lambda *args: None)
        return function(*args)


def programs(net):
    """Those of the state that the network was in last."""
    (found,) = fast_network._known[net.cells][0].by_dtype.values()
    return None if found.trainings is None else [*found.trainings.values()]


def steps(net, count=3, images=None, target=None):
    """What count steps of SGD leave behind, gradients added up over the last two."""
    if images is None:
        images, target = batch()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    for k in range(count):
        torch.manual_seed(k)
        if k < count - 1:
            optimizer.zero_grad()
        loss_of(net, images, target).backward()
        optimizer.step()
    return tensors_of(net)


def assert_recorded_as_unrecorded(net, *args):
    other = copy.deepcopy(net)
    assert_same(steps(net, 3, *args), unrecorded(steps, other, 3, *args))
    assert programs(net) and all(programs(net))


# ------------------------------------------------------------------------------------------------- equal bit for bit


@pytest.mark.parametrize("drop_path_prob", [0.0, 0.4])
@pytest.mark.parametrize("name", ["DARTS", "DARTS_V1", "DARTS_V2", "NASNet"])
@pytest.mark.parametrize("kind, size", [(NetworkCIFAR, 8), (NetworkCIFAR, 11), (NetworkImageNet, 41)])
def test_genotypes(name, kind, size, drop_path_prob):
    assert_recorded_as_unrecorded(make(name, kind, drop_path_prob=drop_path_prob), *batch(size=size))


def test_with_the_auxiliary_head_in_float32():
    assert_recorded_as_unrecorded(make(auxiliary=True).float(), batch(size=32)[0].float(), batch()[1])


@pytest.mark.parametrize("drop_path_prob", [0.0, 0.4])
@pytest.mark.parametrize("space", ["involution", "darts", "s2"])
def test_supernets(space, drop_path_prob):
    assert_recorded_as_unrecorded(make_supernet(space, drop_path_prob))


@pytest.mark.parametrize("options", [{"stem_stride": 4}, {"steps": 3, "multiplier": 2}, {"kernel_norm": "none"}])
def test_other_supernets(options):
    assert_recorded_as_unrecorded(make_supernet(**options), *batch(size=19))


def test_a_primitive_that_is_there_twice():
    torch.manual_seed(0)
    primitives = ["skip_connect", "max_pool_3x3", "skip_connect", "sep_conv_3x3"]
    assert_recorded_as_unrecorded(Network(4, 5, 3, nn.CrossEntropyLoss(), primitives=primitives).double())


@pytest.mark.parametrize("of", ["weights", "alphas", "both"])
def test_a_supernet_as_cell_by_cell(of, monkeypatch):
    net, (images, target) = make_supernet(drop_path_prob=0.3), batch()
    weights, alphas = [*net.parameters()], net.arch_parameters()
    wanted = {"weights": weights, "alphas": alphas, "both": weights + alphas}[of]
    for w in weights:
        w.requires_grad_(of != "alphas")

    def gradients(net):
        torch.manual_seed(3)
        loss = loss_of(net, images, target)
        return loss, *torch.autograd.grad(loss, wanted, allow_unused=True)

    results = gradients(net)
    assert all(programs(net))
    monkeypatch.setattr(fast_network, "mixed", lambda *args: None)
    for result, expected in zip(results, gradients(net), strict=True):
        assert (result is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_a_bit(threads):
    before, nets = torch.get_num_threads(), (make(), make())
    expected = steps(nets[0])
    torch.set_num_threads(threads)
    try:
        assert_same(steps(nets[1]), expected)
    finally:
        torch.set_num_threads(before)


def test_images_of_other_layouts_that_want_a_gradient():
    def to_images(net):
        images = batch()[0].contiguous().requires_grad_()
        loss_of(net, images, batch()[1]).backward()
        return [images.grad, *tensors_of(net)]

    assert_same(to_images(make()), unrecorded(to_images, make()))


def test_what_is_frozen_gets_no_gradient():
    def of_half(net):
        for k, w in enumerate(net.parameters()):
            w.requires_grad_(k % 3 > 0)
        loss_of(net, *batch()).backward()
        for k, w in enumerate(net.parameters()):
            w.requires_grad_(k % 2 > 0)
        loss_of(net, *batch()).backward()
        return tensors_of(net)

    net = make()
    assert_same(of_half(net), unrecorded(of_half, make()))
    assert len(programs(net)) == 2


@pytest.mark.parametrize("place", [0, 1])
def test_a_gradient_of_one_output_alone(place):
    def of_one(net):
        net(batch(size=32)[0])[place].square().sum().backward()
        return tensors_of(net)

    net = make(auxiliary=True)
    result = of_one(net)
    assert_same(result, unrecorded(of_one, make(auxiliary=True)))
    assert any(grad is None for grad in result)  # of the other head


def test_nothing_is_read_before_it_is_written(monkeypatch):
    make_arena = recorded.Program.arena
    monkeypatch.setattr(recorded.Program, "arena", lambda program: make_arena(program).fill_(0xFF))  # not a number
    for net in (make("NASNet", drop_path_prob=0.3), make_supernet()):
        assert_recorded_as_unrecorded(net)


def test_below_frozen_cells_nothing_is_differentiated():
    def of_the_last(net):
        for w in (*net.stem.parameters(), *net.cells[:2].parameters()):
            w.requires_grad_(False)
        loss_of(net, *batch()).backward()
        return tensors_of(net)

    net, whole = make(), make()
    assert_same(of_the_last(net), unrecorded(of_the_last, make()))
    loss_of(whole, *batch()).backward()
    assert programs(net)[0].backward.calls < 0.5 * programs(whole)[0].backward.calls


def test_frozen_cells_leave_their_memory():
    net = make()
    for w in (*net.stem.parameters(), *net.cells.parameters()):
        w.requires_grad_(False)
    for _ in range(2):
        loss_of(net, *batch()).backward()
    assert net.classifier.weight.grad is not None
    (found,) = fast_network._known[net.cells][0].by_dtype.values()
    assert len(found.arenas) == 1


def test_gradients_may_be_changed_in_place():
    net = make()
    weights = [*net.cells.parameters()]
    for grad, w in zip(torch.autograd.grad(loss_of(net, *batch()), weights), weights, strict=True):
        before = grad.clone()
        grad += 0.1 * w
        assert torch.equal(grad, before + 0.1 * w)


# ------------------------------------------------------------------------------------------------------- as autograd


def test_backward_twice():
    net, other = make(drop_path_prob=0.3), make(drop_path_prob=0.3)
    torch.manual_seed(0)
    loss = loss_of(net, *batch())
    loss.backward(retain_graph=True)
    once = tensors_of(net)
    loss_of(other, *batch(2)).backward()  # which does not touch what the other one keeps
    loss.backward()
    count, twice = len(net.state_dict()), tensors_of(net)
    assert_same(once[:count], twice[:count])  # statistics followed once
    assert_same([2 * grad for grad in once[count:]], twice[count:])


def test_passes_between_forward_and_backward():
    def of_both(net):
        losses = [loss_of(net, *batch(N)) for N in (3, 4, 3)]
        for loss in losses[1:] + losses[:1]:
            loss.backward()
        return tensors_of(net)

    assert_same(of_both(make()), unrecorded(of_both, make()))


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize(
    "place, record",
    [("op.2.weight", True), ("op.2.weight", False), ("op.1.conv1.bn.weight", True)],  # unrecorded, it is copied
)
def test_weights_that_change_before_backward_are_noticed(place, record, trains):
    net = make()
    weight = net.get_parameter(f"cells.0._ops.0.{place}").requires_grad_(trains)
    loss = loss_of(net, *batch()) if record else unrecorded(loss_of, net, *batch())
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("trains", [True, False])
def test_weights_that_are_replaced_before_backward_are_noticed(trains):
    net = make()
    weight = net.cells[0]._ops[0].op[2].weight.requires_grad_(trains)
    loss = loss_of(net, *batch())
    weight.data = weight.data.clone() * 2
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        loss.backward()


CHANGED = {
    "eval": lambda net: net.eval(),
    "frozen": lambda net: net.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_network_that_is_another_when_one_output_is_differentiated(change):
    net = make(auxiliary=True)
    logits, _ = net(batch(size=32)[0])
    change(net)
    with pytest.raises(RuntimeError, match="changed between forward and backward"):
        logits.sum().backward()


def test_the_gradient_of_one_output_is_expected_the_next_time():
    net, runs = make(auxiliary=True), []
    for _ in range(3):
        net.zero_grad()
        logits, _ = net(batch(size=32)[0])
        (program,) = programs(net)
        runs.append(program._usual)
        logits.sum().backward()
        logits, _ = net(batch(size=32)[0])
        logits.sum().backward(retain_graph=True)
        logits.sum().backward()
    assert runs[0] is program and runs[1] is runs[2] is program._others[False, True]
    other = make(auxiliary=True)
    for _ in range(3):
        other.zero_grad()
        for _ in range(3):
            unrecorded(lambda: other(batch(size=32)[0])[0].sum().backward())
    for one, two in zip(net.parameters(), other.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None)
        assert one.grad is None or torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12)


def test_a_second_derivative_is_refused():
    net = make()
    with pytest.raises(RuntimeError, match="network.fast = False"):
        torch.autograd.grad(loss_of(net, *batch()), net.parameters(), create_graph=True)


@pytest.mark.parametrize("context", ["hooks", "profiler", "anomaly"])
def test_who_watches_sees_every_operation(context):
    seen = []
    contexts = {
        "hooks": lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x),
        "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
        "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    }
    net, other = make(), make()
    with contexts[context]():
        loss_of(net, *batch()).backward()
    assert programs(net) == []
    loss_of(other, *batch()).backward()
    assert_same(tensors_of(net), tensors_of(other))


def test_out_of_memory(monkeypatch):
    net, library = make(), recorded.library()
    loss_of(net, *batch())

    class Full:
        recorded_run = staticmethod(lambda *args: 1)
        recorded_add = library.recorded_add

    monkeypatch.setattr(recorded, "library", Full)
    with pytest.raises(MemoryError, match="recorded"):
        loss_of(net, *batch())


# ------------------------------------------------------------------------------------------------ never out of date


def weight_of(net):
    return net.cells[0]._ops[0].op[2].weight


@torch.no_grad()
def transpose_in_place(net):
    weight_of(net).transpose_(0, 1)


CHANGES = {
    "a step": lambda net: [w.data.mul_(1.1) for w in net.parameters()],
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "assigned": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True),
    "data": lambda net: setattr(weight_of(net), "data", weight_of(net).data * 1.1),
    "strides": lambda net: setattr(weight_of(net), "data", weight_of(net).data.transpose(0, 1)),
    "in-place strides": transpose_in_place,
    "a layer": lambda net: net.cells[0]._ops[0].op.register_module("3", nn.BatchNorm2d(4, momentum=0.5).double()),
    "a cell": lambda net: net.cells.register_module("1", make("DARTS_V2").cells[1]),
    "edges": lambda net: net.cells[0]._indices.sort(),
    "dilation": lambda net: setattr(net.cells[0]._ops[0].op[1], "dilation", 3),
    "kernel_norm": lambda net: setattr(net.cells[0]._ops[0].op[1], "kernel_norm", "none"),
    "one in evaluation": lambda net: net.cells[0]._ops[0].op[3].eval(),
    "a hook": lambda net: net.cells[0]._ops[0].op[3].register_forward_hook(lambda m, args, output: 2 * output),
    "a forward": lambda net: setattr(net.cells[0], "forward", lambda s0, s1, p: torch.cat([s1[:, :4]] * 4, 1)),
}


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_after_a_pass_was_recorded_is_seen(change):
    net = make()
    steps(net)
    assert programs(net)
    change(net)
    net.zero_grad()
    plain = copy.deepcopy(net)
    plain.fast = False
    for one, other in zip(steps(net, 1), steps(plain, 1), strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one.double(), other.double(), rtol=1e-8, atol=1e-9)


def test_alphas_of_another_form_are_refused():
    net = make_supernet()
    loss_of(net, *batch()).backward()
    net.alphas_normal = nn.Parameter(torch.randn(3, 7).double())
    with pytest.raises(ValueError, match="more edges or primitives"):
        net(batch()[0])


def test_a_statistic_of_another_size_is_refused():
    net = make()
    net.cells[0]._ops[0].op[3].running_mean = torch.zeros(2).double()
    with pytest.raises(RuntimeError):
        net(batch()[0])


def test_a_probability_that_is_a_tensor():
    net = make(drop_path_prob=torch.tensor(0.3))
    assert_recorded_as_unrecorded(net)
    assert len(programs(net)) == 1


# ----------------------------------------------------------------------------------------------- programs, and memory


def test_one_for_each_size_and_not_too_many(monkeypatch):
    monkeypatch.setattr(fast_network, "_MOST_PROGRAMS", 3)
    net = make()
    for N, size in ((3, 8), (2, 8), (3, 8), (3, 12)):
        loss_of(net, *batch(N, size)).backward()
    assert len(programs(net)) == 3
    assert all(isinstance(program, recorded.Program) for program in programs(net))
    kept = programs(net)
    loss_of(net, *batch(2, 8)).backward()
    assert programs(net) == [*kept[1:], kept[0]]
    kept = programs(net)
    loss_of(net, *batch(5, 8)).backward()  # one too many: seen once, it is not recorded
    assert programs(net) == [*kept[1:], fast_network._ONCE]
    loss_of(net, *batch(5, 8)).backward()
    assert programs(net)[:2] == kept[1:] and isinstance(programs(net)[2], recorded.Program)


def test_they_outlast_an_evaluation():
    net = make()
    loss_of(net, *batch()).backward()
    kept = programs(net)
    with torch.no_grad():
        net.eval()(batch()[0])
    assert programs(net) is None
    loss_of(net.train(), *batch()).backward()
    assert programs(net) == kept and len(kept) == 1


def test_a_network_that_is_new_every_time_is_recorded_no_more():
    net, found, kept = make(), [], []
    for _ in range(5):
        for w in net.parameters():
            kept.append(w.data)
            w.data = w.data.clone()
        loss_of(net, *batch()).backward()
        found.append(bool(programs(net)))
    assert found == [True, True, False, False, False]
    loss_of(net, *batch()).backward()  # as it was a pass ago: from now on it lasts
    assert programs(net)
    other = make()
    for _ in range(6):
        unrecorded(lambda: loss_of(other, *batch()).backward())
    assert_same(tensors_of(net), tensors_of(other))


def test_what_nobody_holds_is_freed():
    for make_one in (make, make_supernet):
        net = make_one()
        loss_of(net, *batch()).backward()
        cells, (program,) = weakref.ref(net.cells), programs(net)
        program = weakref.ref(program)
        del net
        gc.collect()
        assert cells() is None and program() is None


def test_memory_is_that_of_what_is_needed_at_a_time(monkeypatch):
    calls = []
    place = recorded._place
    monkeypatch.setattr(recorded, "_place", lambda recording: calls.extend(recording) or place(recording))
    net = make("NASNet")
    loss_of(net, *batch())
    (program,) = programs(net)
    blocks = {x.block for _, _, packed, _ in calls for x in packed if type(x) is recorded.Address}
    blocks = {block for block in blocks if block.region == recorded._ARENA}
    for one in blocks:
        assert 0 <= one.offset and one.offset + one.size <= program.bytes
        for other in blocks - {one}:
            together = one.first <= other.last and other.first <= one.last
            apart = one.offset + one.size <= other.offset or other.offset + other.size <= one.offset
            assert apart or not together
    needed = [sum(block.size for block in blocks if block.first <= k <= block.last) for k in range(len(calls))]
    assert max(needed) <= program.bytes < 1.05 * max(needed) < 0.7 * sum(block.size for block in blocks)


def test_arenas_are_shared_and_grow():
    net = make()
    for N in (2, 5, 3):
        loss_of(net, *batch(N)).backward()
    (found,) = fast_network._known[net.cells][0].by_dtype.values()
    (arena,) = found.arenas
    assert len(arena) == max(program.bytes for program in programs(net))
