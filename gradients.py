"""The derivatives of a supernet's loss that a search takes: eagerly, in mixed precision, or from CUDA graphs."""

import functools
from contextlib import contextmanager

import torch


class Gradients:
    """The loss of a supernet on a batch, and its gradient.

    Args:
        model: a `model_search.Network`; its tensors must stay where they are in memory.
        amp: compute in bfloat16 what `torch.autocast` computes in it.
        cuda_graph: on a CUDA device, record each kind of gradient once for each shape of a batch, and replay it from
            then on: thousands of launches become one. The next call of a kind overwrites what the last one returned.
    """

    def __init__(self, model, amp=False, cuda_graph=False):
        self.model, self.amp = model, amp
        self.weights, self.alphas = list(model.parameters()), model.arch_parameters()
        self._pool = torch.cuda.graph_pool_handle() if cuda_graph else None
        self._recorded = functools.cache(self._record) if cuda_graph else None

    def __call__(self, of, input, target, precise=False):
        """(loss, logits, gradients), detached.

        Args:
            of: "weights", "alphas" (nothing is kept or computed for the weights) or "both" (alphas first).
            input, target: (N, 3, H, W) and (N,).
            precise: without mixed precision.
        """
        if self._recorded is None:
            values = self._compute(of, precise, input, target)
        else:
            values = self._recorded(of, precise, input.shape)(input, target)
        loss, logits, *grads = values
        return loss, logits, grads

    def _compute(self, of, precise, input, target):
        frozen = [w for w in self.weights if w.requires_grad] if of == "alphas" else []
        for w in frozen:
            w.requires_grad_(False)
        try:
            # autocast's cache of cast weights must not outlive them in a recording
            with torch.autocast(
                input.device.type, torch.bfloat16, enabled=self.amp and not precise, cache_enabled=False
            ):
                logits = self.model(input)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = self.model._criterion(logits, target)
            wanted = {"weights": self.weights, "alphas": self.alphas, "both": self.alphas + self.weights}[of]
            # a shallow supernet may have no normal cell: its alphas then have a zero gradient
            grads = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        finally:
            for w in frozen:
                w.requires_grad_(True)
        if loss.device.type == "cpu":  # where they are, they would cut the memory that is free now into pieces
            grads = [grad.clone() for grad in grads]
        return [loss.detach(), logits.detach(), *grads]

    def _record(self, of, precise, shape):
        like = dict(dtype=self.weights[0].dtype, device=self.weights[0].device)
        input = torch.zeros(shape, **like).contiguous(memory_format=torch.channels_last)
        target = torch.zeros(shape[0], dtype=torch.int64, device=like["device"])
        with buffers_kept(self.model):
            return _Recording(functools.partial(self._compute, of, precise), [input, target], self._pool)


class _Recording:
    """A function of tensors as a CUDA graph, for inputs of the shapes and layouts of those given."""

    def __init__(self, function, inputs, pool):
        self.inputs = inputs
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # for what is compiled, tuned or allocated at first use
            for _ in range(3):
                outputs = function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        # outside the pool: the recordings share it, and each may overwrite what another has left in it
        self.outputs = [output.clone() for output in outputs]
        del outputs
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            torch._foreach_copy_(self.outputs, function(*inputs))

    def __call__(self, *inputs):
        for kept, input in zip(self.inputs, inputs, strict=True):
            kept.copy_(input)
        self.graph.replay()
        return self.outputs


@contextmanager
def buffers_kept(model):
    """Put all buffers (batch norm's running statistics) back, bit for bit, on leaving."""
    buffers = list(model.buffers())
    saved = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(buffers, saved)
