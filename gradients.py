"""The derivatives of a supernet's loss that a search takes: eagerly, in mixed precision, or from CUDA graphs.

Of several processes, each differentiates on its share of a batch, and the mean over all of them is returned: what is
computed from it, such as a virtual step, is the same in all.
"""

import functools
from collections import defaultdict
from contextlib import contextmanager, nullcontext

import torch

from runtime.processes import ALONE


class Gradients:
    """The loss of a supernet on a batch, and its gradient.

    Args:
        model: a `model_search.Network`; its tensors must stay where they are in memory. Weights that are frozen now
            are left out.
        amp: compute in bfloat16 what `torch.autocast` computes in it.
        cuda_graph: on a CUDA device, record each kind of gradient once for each shape of a batch, and replay it from
            then on: thousands of launches become one. The next call of a kind overwrites what the last one returned.
            While a second kind is recorded, the memory of two passes is in use.
        team: the processes that share the batches.
    """

    def __init__(self, model, amp=False, cuda_graph=False, team=ALONE):
        self.model, self.amp, self.team = model, amp, team
        self.weights, self.alphas = [w for w in model.parameters() if w.requires_grad], model.arch_parameters()
        self.buffers = Kept(model.buffers())
        self._statistics = running_statistics(model)
        self._pool = torch.cuda.graph_pool_handle() if cuda_graph else None
        self._recorded = functools.cache(self._record) if cuda_graph else None

    def __call__(self, of, input, target, precise=False, mean=True):
        """(loss, logits, gradients), detached; loss and gradients are means over the processes.

        With the gradient of the weights, batch norm's running statistics become the means of those of the processes.

        Args:
            of: "weights", "alphas" (the weights then do not require gradients) or "both" (alphas first).
            input, target: (N, 3, H, W) and (N,).
            precise: in float32 throughout, without mixed precision and without TF32.
            mean: false for what this process alone has computed, of which a sum will be averaged.
        """
        if self._recorded is None:
            values = self._compute(of, precise, input, target)
        else:
            mode = self.model.training, self.model.fast
            values = self._recorded(of, precise, input.shape, mode)(input, target)
        loss, logits, *grads = values
        if mean:
            self.team.mean_([loss, *grads, *(self._statistics if of == "weights" else ())], len(target))
        return loss, logits, grads

    def _wanted(self, of):
        return {"weights": self.weights, "alphas": self.alphas, "both": self.alphas + self.weights}[of]

    def _compute(self, of, precise, input, target):
        device = input.device.type
        with self._frozen_weights() if of == "alphas" else nullcontext(), _exactly(precise and device == "cuda"):
            # autocast's cache of cast weights must not outlive them in a recording
            with torch.autocast(device, torch.bfloat16, enabled=self.amp and not precise, cache_enabled=False):
                logits = self.model(input)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = self.model._criterion(logits, target)
            grads = _grad(loss, self._wanted(of))
        if device == "cpu":  # autograd's own lie between freed activations, or hold those of all weights; copies do not
            grads = [grad.clone() for grad in grads]
        return [loss.detach(), logits.detach(), *grads]

    def hessian_product(self, vector, input, target):
        """∇²_α L · vector, exact, the mean over the processes: the loss is differentiated twice, in the precision of α.

        The cells are computed edge by edge for this, since those of C++ cannot be differentiated twice. The buffers are
        put back. It takes as long as about ten gradients of these images, and seven times the memory of one.

        Args:
            vector: (alphas,), all of them one after the other; the product has the same form.
        """
        fast, self.model.fast = self.model.fast, False
        try:
            with self.buffers.kept(), self._frozen_weights(), _exactly(input.device.type == "cuda"):
                gradient = _flat(_grad(self.model._loss(input, target), self.alphas, create_graph=True))
                product = _flat(_grad(gradient @ vector.to(gradient), self.alphas))
            self.team.mean_([product], len(target))
            return product
        finally:
            self.model.fast = fast

    @contextmanager
    def _frozen_weights(self):
        for w in self.weights:
            w.requires_grad_(False)
        try:
            yield
        finally:
            for w in self.weights:
                w.requires_grad_(True)

    def _record(self, of, precise, shape, mode):
        like = dict(dtype=self.weights[0].dtype, device=self.weights[0].device)
        input = torch.zeros(shape, **like).contiguous(memory_format=torch.channels_last)
        target = torch.zeros(shape[0], dtype=torch.int64, device=like["device"])
        with Kept(self.model.buffers()).kept():  # within a step, which keeps them itself
            function = functools.partial(self._compute, of, precise)
            return _Recording(function, [input, target], self._wanted(of), self._pool)


def running_statistics(model):
    """The means and variances that its batch norms follow."""
    return [buffer for buffer in model.buffers() if buffer.is_floating_point()]


def random_states(device):
    """The states that a pass on a device draws from (for noise, for dropped paths)."""
    return [generator.get_rng_state() for generator in _generators(device)]


@contextmanager
def from_random_states(device, states):
    """Draw from these states; on leaving, the present ones are put back."""
    before = random_states(device)
    try:
        _set_random_states(device, states)
        yield
    finally:
        _set_random_states(device, before)


@contextmanager
def from_seed(device, seed):
    """Draw from a seed; on leaving, the present states are put back."""
    with from_random_states(device, random_states(device)):
        torch.manual_seed(seed)
        yield


def _set_random_states(device, states):
    for generator, state in zip(_generators(device), states, strict=True):
        generator.set_rng_state(state)


def _generators(device):
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


def _grad(scalar, wanted, create_graph=False):
    """Gradients; a shallow supernet may have no normal cell: its alphas then have a zero gradient."""
    return torch.autograd.grad(scalar, wanted, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def _flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


class _Recording:
    """A function of tensors as a CUDA graph, for inputs of the shapes and layouts of those given.

    It returns two results and the gradients of `wanted`, these in the layout of `wanted`, as torch._foreach wants them.
    """

    def __init__(self, function, inputs, wanted, pool):
        self.inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # for what is compiled, tuned or allocated at first use
            for _ in range(3):
                results = function(*inputs)[:2]
        torch.cuda.current_stream().wait_stream(stream)
        # outside the pool: the recordings share it, and each may overwrite what another has left in it
        self.outputs = [torch.empty_like(x) for x in results] + [torch.empty_like(x).detach() for x in wanted]
        del results
        self.graph = torch.cuda.CUDAGraph()
        # other threads, as those of NCCL, may go on meanwhile
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            torch._foreach_copy_(self.outputs, function(*inputs))

    def __call__(self, *inputs):
        for kept, input in zip(self.inputs, inputs, strict=True):
            kept.copy_(input)
        self.graph.replay()
        return self.outputs


class Kept:
    """Tensors that can be put back, bit for bit, to what they were when `save` was called."""

    def __init__(self, tensors):
        groups = defaultdict(list)
        for tensor in tensors:
            groups[tensor.dtype].append(tensor)  # torch._foreach is fast for one dtype at a time
        self._groups = [(group, [torch.empty_like(t).detach() for t in group]) for group in groups.values()]

    @torch.no_grad()
    def save(self):
        for tensors, copies in self._groups:
            torch._foreach_copy_(copies, tensors)

    @torch.no_grad()
    def put_back(self):
        for tensors, copies in self._groups:
            torch._foreach_copy_(tensors, copies)

    @contextmanager
    def kept(self):
        """Put them back on leaving."""
        self.save()
        try:
            yield
        finally:
            self.put_back()


@contextmanager
def _exactly(without_tf32):
    """Products of float32 in float32 on a GPU, where by default convolutions round their operands to 10 bits."""
    if not without_tf32:
        yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
