"""Evaluation without gradients, by a recorded program: against plain cells, whatever was changed since it was recorded.

That it is equal for every primitive, genotype and size is in test_model.py, with the other fast cells.
"""

import copy
import functools
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn as nn

import fast_cell
import fast_network
from genotypes import NAMED
from kernels import build, inference_cpu
from model import NetworkCIFAR, NetworkImageNet
from test_model import make

pytestmark = pytest.mark.skipif(
    not fast_network.serves(torch.zeros(1)), reason="no C++ compiler here, or another backend is asked for"
)


def images(N=3, size=8, dtype=torch.float64):
    torch.manual_seed(2)
    return torch.randn(N, 3, size, size, dtype=dtype)


def logits(net, input, fast=True):
    """Of a network in evaluation."""
    net.eval().fast = fast
    with torch.no_grad():
        return net(input)[0]


def assert_equal_to_plain(net, input=None):
    input = images() if input is None else input
    torch.testing.assert_close(logits(net, input), logits(net, input, fast=False), rtol=1e-9, atol=1e-12)


def programs(net):
    """Those that were recorded of a network, or None where it cannot be recorded."""
    (found,) = fast_network._known[net.cells][0].by_dtype.values()
    return None if found.evaluations is None else list(found.evaluations.values())


@pytest.mark.parametrize("kind, size", [(NetworkCIFAR, 8), (NetworkImageNet, 41)])
@pytest.mark.parametrize("name", ["DARTS", "DARTS_V2"])
def test_images_at_a_time_do_not_change_a_bit(name, kind, size):
    net, results = make(NAMED[name], kind=kind).eval(), []
    inputs, _ = fast_network._inputs(net._stems(), images(5, size))
    with torch.no_grad():
        net(images(5, size))
        (program,) = programs(net)
        for count in (1, 2, 3, 5, 8):
            results.append(program.run(inputs, count)[0])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_do_not_change_a_bit(threads):
    net, before = make(NAMED["DARTS"]), torch.get_num_threads()
    expected = logits(net, images())
    torch.set_num_threads(threads)
    try:
        assert torch.equal(logits(net, images()), expected)
    finally:
        torch.set_num_threads(before)


def test_a_network_is_recorded_once_for_each_size():
    net = make(NAMED["DARTS"])
    for N, size in ((3, 8), (4, 8), (3, 12), (2, 8)):
        assert_equal_to_plain(net, images(N, size))
    assert len(programs(net)) == 2


def test_float32():
    net = make(NAMED["DARTS"], C=16).float()
    input = images(4, 16, torch.float32)
    expected = logits(copy.deepcopy(net).double(), input.double(), fast=False)
    errors = [(logits(net, input, fast) - expected).norm() for fast in (True, False)]
    assert errors[0] < 1.5 * errors[1]


def without_weights(module):
    if isinstance(module, nn.BatchNorm2d):
        module.weight.data.fill_(1)


CHANGES = {
    "weights": lambda net: [w.data.mul_(1.1) for w in net.parameters()],
    "statistics": lambda net: [b.add_(1) for b in net.buffers()],
    "a step": lambda net: net.train()(images()),
    "load_state_dict": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}),
    "assigned": lambda net: net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=True),
    "data": lambda net: [setattr(w, "data", w.data * 1.1) for w in net.parameters()],
    "a parameter": lambda net: setattr(net.cells[0].preprocess1.op[2], "weight", nn.Parameter(torch.ones(8).double())),
    "a statistic": lambda net: net.cells[0].preprocess1.op[2]._buffers.update(running_mean=torch.ones(8).double()),
    "a layer": lambda net: net.cells[0]._ops[0].op.register_module("3", nn.BatchNorm2d(8).double().eval()),
    "an operation": lambda net: net.cells[0]._ops.register_module("0", nn.Tanh()),
    "a cell": lambda net: net.cells.register_module("1", make(NAMED["DARTS"]).cells[1].apply(without_weights).eval()),
    "the stem": lambda net: net.stem.register_module("1", nn.BatchNorm2d(24, momentum=0.5).double().eval()),
    "edges": lambda net: net.cells[0]._indices.sort(),
    "dilation": lambda net: setattr(net.cells[0]._ops[0].op[1], "dilation", 3),
    "the stem's padding": lambda net: setattr(net.stem[0], "padding_mode", "circular"),
    "eps": lambda net: setattr(net.cells[0]._ops[0].op[3], "eps", 0.1),
    "kernel_norm": lambda net: setattr(net.cells[0]._ops[0].op[1], "kernel_norm", "rms"),
    "a forward": lambda net: setattr(net.cells[0], "forward", lambda s0, s1, p: torch.cat([s1[:, :8]] * 4, 1)),
    "training": lambda net: net.cells[0]._ops[0].op[3].train(),
    "a hook": lambda net: net.cells[0]._ops[0].op[3].register_forward_hook(lambda m, args, output: 2 * output),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_after_a_network_was_recorded_is_seen(change):
    net, input = make(NAMED["DARTS"], drop_path_prob=0.0), images()
    before = logits(net, input)
    assert programs(net)
    change(net)
    plain = copy.deepcopy(net)
    if change is CHANGES["a step"]:
        net.eval(), plain.eval()
    net.fast, plain.fast = True, False
    with torch.no_grad():
        after, expected = net(input)[0], plain(input)[0]
    torch.testing.assert_close(after, expected, rtol=1e-9, atol=1e-12)
    assert not torch.equal(after, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
def test_images_of_any_layout_and_number_of_channels(channels, layout):
    net = make(NAMED["DARTS"])
    net.stem[0] = nn.Conv2d(channels, 24, 3, padding=1, bias=False).double()
    net = net.to(memory_format=layout)
    for input in (torch.randn(3, channels, 8, 9).double(), torch.randn(2, channels, 8, 9, requires_grad=True).double()):
        assert_equal_to_plain(net, input.to(memory_format=layout))
    assert len(programs(net)) == 1


class Doubled(torch.nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_class_that_changes_is_seen():
    net, input = make(NAMED["DARTS"]), images()
    logits(net, input)
    net.cells[0]._ops[0].op[2].__class__ = Doubled
    assert_equal_to_plain(net, input)


def test_tensors_without_an_address():
    net = make(NAMED["DARTS"])
    net.cells[0].register_buffer("mask", torch.eye(3).to_sparse())
    assert_equal_to_plain(net)
    assert net.cells not in fast_network._known


def test_a_network_whose_hook_holds_it_is_freed():
    net = make(NAMED["DARTS"])
    logits(net, images())
    net.cells[0]._ops[0].op[3].register_forward_hook(lambda module, args, output, net=net: None)
    logits(net, images())
    cells = weakref.ref(net.cells)
    del net
    gc.collect()
    assert cells() is None


def test_attributes_that_have_no_single_truth():
    net = make(NAMED["DARTS"])
    net.cells[0].mark = torch.zeros(2)
    assert_equal_to_plain(net)
    net.cells[0].mark = torch.zeros(2)
    assert_equal_to_plain(net)


def test_a_network_that_nobody_holds_is_freed_and_copies_stand_alone():
    net = make(NAMED["DARTS"])
    expected = logits(net, images())
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.cells not in fast_network._known
        assert torch.equal(logits(other, images()), expected)
    cells = weakref.ref(net.cells)
    del net
    gc.collect()
    assert cells() is None


def test_training_and_unknown_operations_are_not_recorded(monkeypatch):
    net = make(NAMED["AmoebaNet"])  # which has convolutions of 7x1 and 1x7 pixels
    assert_equal_to_plain(net)
    assert programs(net) is None
    net = make(NAMED["DARTS"]).train()
    with torch.no_grad():
        net(images())
    assert programs(net) is None


def test_another_pooling_before_the_kernels():
    net = make(NAMED["DARTS"])
    strided = [m for m in net.modules() if isinstance(m, nn.AvgPool2d) and m.ceil_mode]
    strided[0].divisor_override = 3
    assert_equal_to_plain(net)
    assert programs(net) == [None]


def test_without_a_compiler(monkeypatch):
    def fail():
        raise build.BuildError("no compiler")

    monkeypatch.setattr(inference_cpu, "library", fail)
    net = make(NAMED["DARTS"])
    assert_equal_to_plain(net)
    assert programs(net) == [None]


def test_maps_in_use_at_a_time_do_not_overlap():
    net = make(NAMED["NASNet"])
    logits(net, images())
    (given,), (is_of_images,) = fast_network._inputs(net._stems(), images())
    assert is_of_images
    recording = inference_cpu.Recording([given])
    (known,) = fast_network._known[net.cells][0].by_dtype.values()
    stem = [functools.partial(fast_network._recorded_stem, given, is_of_images, net.stem)]
    with torch.no_grad():
        inputs = fast_cell.states_of_inputs(stem, known.plans, None, recording)
        for _, nodes in fast_cell.nodes_of_cells(inputs, known.plans, fast_cell.Given(0.0, None), {2}, recording):
            recording.hand_on([node.plain for node in nodes])
    most = inference_cpu.Program(recording).bytes
    blocks = {x for numbers in recording.passes for x in numbers if isinstance(x, inference_cpu.Block)}
    for one in blocks:
        assert 0 <= one.offset and one.offset + one.size <= most
        for other in blocks - {one}:
            together = one.first <= other.last and other.first <= one.last
            apart = one.offset + one.size <= other.offset or other.offset + other.size <= one.offset
            assert apart or not together
    assert most < 0.25 * sum(block.size for block in blocks)


def test_out_of_memory():
    net = make(NAMED["DARTS"])
    logits(net, images())
    (program,) = programs(net)
    program.bytes = 2**60
    with pytest.raises(MemoryError, match="inference_evaluate"):
        logits(net, images())
