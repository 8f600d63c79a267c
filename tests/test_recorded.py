"""Training passes that are recorded: bit for bit what the same cells give without, and never out of date."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fast_cell
from conftest import vary_kernels
from genotypes import NAMED, SEARCH_SPACES
from kernels import recorded
from model import NetworkCIFAR, NetworkImageNet
from model_search import Network

pytestmark = pytest.mark.skipif(
    not fast_cell.serves(torch.zeros(1)), reason="no C++ compiler here, or another backend is asked for"
)


def make(name="DARTS", kind=NetworkCIFAR, auxiliary=False, drop_path_prob=0.0):
    torch.manual_seed(0)
    net = vary_kernels(kind(4, 5, 3, auxiliary, NAMED[name]).double())
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
        patch.setattr(fast_cell, "_train", lambda *args: None)
        return function(*args)


def programs(net):
    """Those of the state that the network was in last."""
    (found,) = fast_cell._known[net.cells][0].by_dtype.values()
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
    monkeypatch.setattr(fast_cell, "mixed", lambda *args: None)
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


def test_weights_that_change_before_backward_are_noticed():
    net = make()
    loss = loss_of(net, *batch())
    with torch.no_grad():
        net.cells[0]._ops[0].op[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_derivative_is_refused():
    net = make()
    with pytest.raises(RuntimeError, match="net"):
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


# ----------------------------------------------------------------------------------------------- programs, and memory


def test_one_for_each_size_and_not_too_many(monkeypatch):
    monkeypatch.setattr(fast_cell, "_MOST_PROGRAMS", 3)
    net = make()
    for N, size in ((3, 8), (2, 8), (3, 8), (3, 12)):
        loss_of(net, *batch(N, size)).backward()
    assert len(programs(net)) == 3
    kept = programs(net)
    loss_of(net, *batch(5, 8)).backward()
    assert programs(net)[:2] == kept[1:] and len(programs(net)) == 3


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
    for _ in found:
        unrecorded(lambda: loss_of(other, *batch()).backward())
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
    (found,) = fast_cell._known[net.cells][0].by_dtype.values()
    (arena,) = found.arenas
    assert len(arena) == max(program.bytes for program in programs(net))
