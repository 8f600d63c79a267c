"""Involution on a GPU, in Triton: the three passes of `involution2d` and those of the fused operator.

    out[n, c, h, w] = sum_{kh, kw} weight[n, g, kh*K + kw, h, w]
                      * input[n, c, h*s + (kh - K//2)*d, w*s + (kw - K//2)*d]        g = floor(c*G/C)

with zeros outside the image, s the stride and d the dilation (arXiv 2103.06255, eq. 4). In the fused operator

    weight[n, g, t, h, w] = span_bias[g*K*K + t] + sum_r span_weight[g*K*K + t, r] * hidden[n, r, h, w]

is made in registers for every pixel, by each pass again, and never written to memory.

One program owns BLOCK_P strips of V neighbouring pixels of a row, and the CG = C/G channels of one group. V
is up to STRIP where stride and dilation are 1: a column of pixels is then loaded once for the V outputs that
read it, and slides through a window in registers. Elsewhere V is 1. Sums are in float32 (float64 for float64
tensors). There are no atomics: grad_input gathers from the output pixels that read an input pixel, and the
gradients of span_weight and span_bias are partial sums of a fixed number of programs, added in a fixed order.
Two runs give the same bits where the same blocks are chosen.

Strides are passed as tuples in the order of the dimensions, so NCHW and channels-last are both read in place;
in channels-last a pixel's channels are loaded as vectors. TRITON_INTERPRET=1, set before triton is imported,
runs the kernels on the CPU.
"""

import math
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the triton backend needs the triton package (pip install triton)") from error

from .involution_arguments import memory_format

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 3):  # the first with tuples as arguments
    raise ImportError(f"the triton backend needs Triton 3.3 or later, got {triton.__version__}")

DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
BLOCKS = {  # strips in a program, and its warps
    "small": triton.Config({"BLOCK_P": 16}, num_warps=1),
    "spread": triton.Config({"BLOCK_P": 32}, num_warps=4),
    "middle": triton.Config({"BLOCK_P": 32}, num_warps=2),
    "large": triton.Config({"BLOCK_P": 64}, num_warps=4),
}
MIN_BLOCK_P = min(block.kwargs["BLOCK_P"] for block in BLOCKS.values())
STRIP = 4  # at K = 7, 10 columns of pixels are loaded instead of 28
STRIP_VALUES = 128  # channels and hidden features of a strip's pixels, as many as stay in registers
SPAN_PROGRAMS = 2048  # share the sums over all pixels: several for each multiprocessor of the largest GPUs
SPAN_COLUMNS = 16  # of span_weight's gradient in one program: K times as many sums are held in registers

# The interpreter gets one block: its time is that of the operations, whatever the size of their tiles.
_configs = [BLOCKS["large"]] if os.environ.get("TRITON_INTERPRET") == "1" else list(BLOCKS.values())
_autotune = triton.autotune(_configs, key=["sizes", "CG", "R", "K", "stride", "dilation", "INDEX"])


# ----------------------------------------------------------------------------------------- inside the kernels


@triton.jit
def _tile(G, H, W, V: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The program's image n, group g, channels c of the group, and first pixel (h, w) of each of its strips.

    Grid: (N * ceil(H * ceil(W/V) / BLOCK_P) * G,). Groups run fastest: they share cache lines.
    """
    strips = tl.cdiv(W, V)
    blocks = tl.cdiv(H * strips, BLOCK_P)
    pid = tl.program_id(0)
    n = (pid // G // blocks).to(tl.int64)  # offsets of whole images and groups may pass 2^31
    g = (pid % G).to(tl.int64)
    h, w = _strips(pid // G % blocks, strips, V, INDEX, BLOCK_P)
    return n, g, tl.arange(0, BLOCK_C).to(INDEX), h, w


@triton.jit
def _strips(block, strips, V: tl.constexpr, INDEX: tl.constexpr, BLOCK_P: tl.constexpr):
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    return (p // strips).to(INDEX), (p % strips * V).to(INDEX)


@triton.jit
def _load(ptr, strides, c, h, w, H, W, CG, valid, ACC: tl.constexpr):
    """Channels c of the pixels (h, w): (BLOCK_C, BLOCK_P), zeros outside the image and where not valid."""
    mask = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    offsets = (h * strides[2] + w * strides[3])[None, :] + (c * strides[1])[:, None]
    return tl.load(ptr + offsets, mask=mask[None, :] & (c < CG)[:, None], other=0.0).to(ACC)


@triton.jit
def _store(ptr, strides, c, h, w, H, W, CG, value):
    mask = (h < H) & (w < W)
    offsets = (h * strides[2] + w * strides[3])[None, :] + (c * strides[1])[:, None]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask[None, :] & (c < CG)[:, None])


@triton.jit
def _load_weight(ptr, strides, h, w, H, W, valid, ACC: tl.constexpr):
    """One tap's weight at the pixels (h, w): (BLOCK_P,), zeros outside the image and where not valid."""
    mask = valid & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    return tl.load(ptr + h * strides[3] + w * strides[4], mask=mask, other=0.0).to(ACC)


@triton.jit
def _load_hidden(ptr, r, h, w, H, W, R: tl.constexpr, valid, ACC: tl.constexpr):
    """Features r of the pixels (h, w), stored as (H, W, R): (BLOCK_R, BLOCK_P), zeros as in `_load`."""
    return _load(ptr, (0, 1, W * R, R), r, h, w, H, W, R, valid, ACC)


@triton.jit
def _make_weight(hidden, span_weight_ptr, span_bias_ptr, t, r, R: tl.constexpr, ACC: tl.constexpr):
    """Tap t's weight at the pixels of `hidden` (BLOCK_R, BLOCK_P): (BLOCK_P,)."""
    span = tl.load(span_weight_ptr + t * R + r, mask=r < R, other=0.0).to(ACC)
    return tl.sum(hidden * span[:, None], axis=0) + tl.load(span_bias_ptr + t).to(ACC)


@triton.jit
def _reader(position, stride: tl.constexpr):
    """The output row (or column) whose tap falls on an input position, and whether there is one."""
    return position // stride, (position >= 0) & (position % stride == 0)


@triton.jit
def _probe(ptr, strides):
    tl.store(ptr, strides[0])


# ---------------------------------------------------------------------------------------------- given weights


@_autotune
@triton.jit
def _forward_kernel(
    input_ptr,  # (N, C, H, W)
    weight_ptr,  # (N, G, K*K, Ho, Wo)
    output_ptr,  # (N, C, Ho, Wo)
    input_strides,
    weight_strides,
    output_strides,
    sizes,  # H, W, Ho, Wo, G
    CG: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    H, W, Ho, Wo, G = sizes
    n, g, c, h, w = _tile(G, Ho, Wo, V, INDEX, BLOCK_P, BLOCK_C)
    input_ptr += n * input_strides[0] + g * CG * input_strides[1]
    weight_ptr += n * weight_strides[0] + g * weight_strides[1]
    output_ptr += n * output_strides[0] + g * CG * output_strides[1]
    valid = h < Ho
    x = w * stride - K // 2 * dilation
    sums = (tl.zeros((BLOCK_C, BLOCK_P), ACC),) * V
    for kh in range(K):
        y = h * stride + (kh - K // 2) * dilation
        window = ()
        for v in tl.static_range(V - 1):
            window = window + (_load(input_ptr, input_strides, c, y, x + v, H, W, CG, valid, ACC),)
        for kw in tl.static_range(K):
            column = x + kw * dilation + (V - 1)
            window = window + (_load(input_ptr, input_strides, c, y, column, H, W, CG, valid, ACC),)
            for v in tl.static_range(V):
                weight = _load_weight(weight_ptr, weight_strides, h, w + v, Ho, Wo, valid, ACC)
                sums = sums[1:] + (sums[0] + weight[None, :] * window[v],)  # a full turn after V steps
            window = window[1:]
            weight_ptr += weight_strides[2]
    for v in tl.static_range(V):
        _store(output_ptr, output_strides, c, h, w + v, Ho, Wo, CG, sums[v])


@_autotune
@triton.jit
def _grad_input_kernel(
    grad_ptr,  # grad_output (N, C, Ho, Wo)
    weight_ptr,  # (N, G, K*K, Ho, Wo)
    grad_input_ptr,  # (N, C, H, W)
    grad_strides,
    weight_strides,
    grad_input_strides,
    sizes,  # H, W, Ho, Wo, G
    CG: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    H, W, Ho, Wo, G = sizes
    n, g, c, h, w = _tile(G, H, W, V, INDEX, BLOCK_P, BLOCK_C)
    grad_ptr += n * grad_strides[0] + g * CG * grad_strides[1]
    weight_ptr += n * weight_strides[0] + g * weight_strides[1]
    grad_input_ptr += n * grad_input_strides[0] + g * CG * grad_input_strides[1]
    sums = (tl.zeros((BLOCK_C, BLOCK_P), ACC),) * V
    # The last tap reads the leftmost pixel: the taps run backwards, for the window to slide to the right.
    weight_ptr += tl.full((), K * K - 1, tl.int64) * weight_strides[2]
    for kh in range(K - 1, -1, -1):
        y, valid = _reader(h + (K // 2 - kh) * dilation, stride)
        valid = valid & (h < H)
        window = ()
        for v in tl.static_range(V - 1):
            column = w + v - K // 2
            window = window + (_load(grad_ptr, grad_strides, c, y, column, Ho, Wo, CG, valid, ACC),)
        for kw in tl.static_range(K - 1, -1, -1):
            column, reads = _reader(w + V - 1 + (K // 2 - kw) * dilation, stride)
            reads = reads & valid
            window = window + (_load(grad_ptr, grad_strides, c, y, column, Ho, Wo, CG, reads, ACC),)
            for v in tl.static_range(V):
                weight = _load_weight(weight_ptr, weight_strides, y, column - (V - 1 - v), Ho, Wo, reads, ACC)
                sums = sums[1:] + (sums[0] + weight[None, :] * window[v],)
            window = window[1:]
            weight_ptr -= weight_strides[2]
    for v in tl.static_range(V):
        _store(grad_input_ptr, grad_input_strides, c, h, w + v, H, W, CG, sums[v])


@_autotune
@triton.jit
def _grad_weight_kernel(
    grad_ptr,  # grad_output (N, C, Ho, Wo)
    input_ptr,  # (N, C, H, W)
    grad_weight_ptr,  # (N, G, K*K, Ho, Wo)
    grad_strides,
    input_strides,
    grad_weight_strides,
    sizes,  # H, W, Ho, Wo, G
    CG: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    H, W, Ho, Wo, G = sizes
    n, g, c, h, w = _tile(G, Ho, Wo, V, INDEX, BLOCK_P, BLOCK_C)
    grad_ptr += n * grad_strides[0] + g * CG * grad_strides[1]
    input_ptr += n * input_strides[0] + g * CG * input_strides[1]
    grad_weight_ptr += n * grad_weight_strides[0] + g * grad_weight_strides[1]
    valid = h < Ho
    x = w * stride - K // 2 * dilation
    grads = ()
    for v in tl.static_range(V):
        grads = grads + (_load(grad_ptr, grad_strides, c, h, w + v, Ho, Wo, CG, valid, ACC),)
    for kh in range(K):
        y = h * stride + (kh - K // 2) * dilation
        window = ()
        for v in tl.static_range(V - 1):
            window = window + (_load(input_ptr, input_strides, c, y, x + v, H, W, CG, valid, ACC),)
        for kw in tl.static_range(K):
            column = x + kw * dilation + (V - 1)
            window = window + (_load(input_ptr, input_strides, c, y, column, H, W, CG, valid, ACC),)
            for v in tl.static_range(V):
                pointers = grad_weight_ptr + h * grad_weight_strides[3] + (w + v) * grad_weight_strides[4]
                value = tl.sum(grads[v] * window[v], axis=0)
                tl.store(pointers, value.to(grad_weight_ptr.dtype.element_ty), mask=valid & (w + v < Wo))
            window = window[1:]
            grad_weight_ptr += grad_weight_strides[2]


# ------------------------------------------------------------------------------------------------------ fused
# hidden and its gradient are stored as (N, Ho, Wo, R): with R known at compile time they are read as vectors.


@_autotune
@triton.jit
def _fused_forward_kernel(
    input_ptr,  # (N, C, H, W)
    hidden_ptr,  # (N, Ho, Wo, R)
    span_weight_ptr,  # (G*K*K, R)
    span_bias_ptr,  # (G*K*K,)
    output_ptr,  # (N, C, Ho, Wo)
    input_strides,
    output_strides,
    sizes,  # H, W, Ho, Wo, G
    CG: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    H, W, Ho, Wo, G = sizes
    n, g, c, h, w = _tile(G, Ho, Wo, V, INDEX, BLOCK_P, BLOCK_C)
    r = tl.arange(0, BLOCK_R).to(INDEX)
    input_ptr += n * input_strides[0] + g * CG * input_strides[1]
    hidden_ptr += n * Ho * Wo * R
    output_ptr += n * output_strides[0] + g * CG * output_strides[1]
    valid = h < Ho
    x = w * stride - K // 2 * dilation
    hidden = ()
    for v in tl.static_range(V):
        hidden = hidden + (_load_hidden(hidden_ptr, r, h, w + v, Ho, Wo, R, valid, ACC),)
    sums = (tl.zeros((BLOCK_C, BLOCK_P), ACC),) * V
    for kh in range(K):
        y = h * stride + (kh - K // 2) * dilation
        window = ()
        for v in tl.static_range(V - 1):
            window = window + (_load(input_ptr, input_strides, c, y, x + v, H, W, CG, valid, ACC),)
        for kw in tl.static_range(K):
            column = x + kw * dilation + (V - 1)
            window = window + (_load(input_ptr, input_strides, c, y, column, H, W, CG, valid, ACC),)
            t = g * K * K + kh * K + kw
            for v in tl.static_range(V):
                weight = _make_weight(hidden[v], span_weight_ptr, span_bias_ptr, t, r, R, ACC)
                sums = sums[1:] + (sums[0] + weight[None, :] * window[v],)
            window = window[1:]
    for v in tl.static_range(V):
        _store(output_ptr, output_strides, c, h, w + v, Ho, Wo, CG, sums[v])


@_autotune
@triton.jit
def _fused_grad_input_kernel(
    grad_ptr,  # grad_output (N, C, Ho, Wo)
    hidden_ptr,  # (N, Ho, Wo, R)
    span_weight_ptr,  # (G*K*K, R)
    span_bias_ptr,  # (G*K*K,)
    grad_input_ptr,  # (N, C, H, W)
    grad_strides,
    grad_input_strides,
    sizes,  # H, W, Ho, Wo, G
    CG: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    H, W, Ho, Wo, G = sizes
    n, g, c, h, w = _tile(G, H, W, V, INDEX, BLOCK_P, BLOCK_C)
    r = tl.arange(0, BLOCK_R).to(INDEX)
    grad_ptr += n * grad_strides[0] + g * CG * grad_strides[1]
    hidden_ptr += n * Ho * Wo * R
    grad_input_ptr += n * grad_input_strides[0] + g * CG * grad_input_strides[1]
    sums = (tl.zeros((BLOCK_C, BLOCK_P), ACC),) * V
    for kh in range(K - 1, -1, -1):
        y, valid = _reader(h + (K // 2 - kh) * dilation, stride)
        valid = valid & (h < H)
        window, hidden = (), ()
        for v in tl.static_range(V - 1):
            column = w + v - K // 2
            window = window + (_load(grad_ptr, grad_strides, c, y, column, Ho, Wo, CG, valid, ACC),)
            hidden = hidden + (_load_hidden(hidden_ptr, r, y, column, Ho, Wo, R, valid, ACC),)
        for kw in tl.static_range(K - 1, -1, -1):
            column, reads = _reader(w + V - 1 + (K // 2 - kw) * dilation, stride)
            reads = reads & valid
            window = window + (_load(grad_ptr, grad_strides, c, y, column, Ho, Wo, CG, reads, ACC),)
            hidden = hidden + (_load_hidden(hidden_ptr, r, y, column, Ho, Wo, R, reads, ACC),)
            t = g * K * K + kh * K + kw
            for v in tl.static_range(V):
                weight = _make_weight(hidden[v], span_weight_ptr, span_bias_ptr, t, r, R, ACC)
                sums = sums[1:] + (sums[0] + weight[None, :] * window[v],)
            window, hidden = window[1:], hidden[1:]
    for v in tl.static_range(V):
        _store(grad_input_ptr, grad_input_strides, c, h, w + v, H, W, CG, sums[v])


@_autotune
@triton.jit
def _fused_grad_hidden_kernel(
    grad_ptr,  # grad_output (N, C, Ho, Wo)
    input_ptr,  # (N, C, H, W)
    span_weight_ptr,  # (G*K*K, R)
    grad_hidden_ptr,  # (N, Ho, Wo, R)
    grad_strides,
    input_strides,
    sizes,  # H, W, Ho, Wo, G
    CG: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    H, W, Ho, Wo, G = sizes
    # One program takes all groups, as they share hidden: the tile has a single one.
    n, _g, c, h, w = _tile(1, Ho, Wo, V, INDEX, BLOCK_P, BLOCK_C)
    r = tl.arange(0, BLOCK_R).to(INDEX)
    grad_ptr += n * grad_strides[0]
    input_ptr += n * input_strides[0]
    grad_hidden_ptr += n * Ho * Wo * R
    valid = h < Ho
    x = w * stride - K // 2 * dilation
    sums = (tl.zeros((BLOCK_R, BLOCK_P), ACC),) * V
    for _group in range(G):
        grads = ()
        for v in tl.static_range(V):
            grads = grads + (_load(grad_ptr, grad_strides, c, h, w + v, Ho, Wo, CG, valid, ACC),)
        for kh in range(K):
            y = h * stride + (kh - K // 2) * dilation
            window = ()
            for v in tl.static_range(V - 1):
                window = window + (_load(input_ptr, input_strides, c, y, x + v, H, W, CG, valid, ACC),)
            for kw in tl.static_range(K):
                column = x + kw * dilation + (V - 1)
                window = window + (_load(input_ptr, input_strides, c, y, column, H, W, CG, valid, ACC),)
                span = tl.load(span_weight_ptr + r, mask=r < R, other=0.0).to(ACC)
                for v in tl.static_range(V):
                    grad_weight = tl.sum(grads[v] * window[v], axis=0)
                    sums = sums[1:] + (sums[0] + grad_weight[None, :] * span[:, None],)
                window = window[1:]
                span_weight_ptr += R
        grad_ptr += CG * grad_strides[1]
        input_ptr += CG * input_strides[1]
    for v in tl.static_range(V):
        _store(grad_hidden_ptr, (0, 1, Wo * R, R), r, h, w + v, Ho, Wo, R, sums[v])


@_autotune
@triton.jit
def _fused_grad_span_kernel(
    grad_ptr,  # grad_output (N, C, Ho, Wo)
    input_ptr,  # (N, C, H, W)
    hidden_ptr,  # (N, Ho, Wo, R)
    partial_weight_ptr,  # (PROGRAMS, G*K*K, R)
    partial_bias_ptr,  # (PROGRAMS, G*K*K)
    grad_strides,
    input_strides,
    sizes,  # H, W, Ho, Wo, G
    N,
    CG: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    stride: tl.constexpr,
    dilation: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (PROGRAMS, G*K, ceil(R / BLOCK_R)): a share of all pixels, one row of taps, BLOCK_R columns."""
    H, W, Ho, Wo, G = sizes
    program, programs = tl.program_id(0), tl.num_programs(0)
    g, kh = (tl.program_id(1) // K).to(tl.int64), tl.program_id(1) % K
    r = (tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)).to(INDEX)
    c = tl.arange(0, BLOCK_C).to(INDEX)
    strips = tl.cdiv(Wo, V)
    blocks = tl.cdiv(Ho * strips, BLOCK_P)
    sums = (tl.zeros((BLOCK_R, BLOCK_P), ACC),) * K
    sums_bias = (tl.zeros((BLOCK_P,), ACC),) * K
    for block in range(program, N * blocks, programs):
        n = (block // blocks).to(tl.int64)
        h, w = _strips(block % blocks, strips, V, INDEX, BLOCK_P)
        grads_n = grad_ptr + n * grad_strides[0] + g * CG * grad_strides[1]
        input_n = input_ptr + n * input_strides[0] + g * CG * input_strides[1]
        hidden_n = hidden_ptr + n * Ho * Wo * R
        valid = h < Ho
        y = h * stride + (kh - K // 2) * dilation
        x = w * stride - K // 2 * dilation
        grads, hidden, window = (), (), ()
        for v in tl.static_range(V):
            grads = grads + (_load(grads_n, grad_strides, c, h, w + v, Ho, Wo, CG, valid, ACC),)
            hidden = hidden + (_load_hidden(hidden_n, r, h, w + v, Ho, Wo, R, valid, ACC),)
        for v in tl.static_range(V - 1):
            window = window + (_load(input_n, input_strides, c, y, x + v, H, W, CG, valid, ACC),)
        for kw in tl.static_range(K):
            column = x + kw * dilation + (V - 1)
            window = window + (_load(input_n, input_strides, c, y, column, H, W, CG, valid, ACC),)
            total, total_bias = sums[0], sums_bias[0]
            for v in tl.static_range(V):
                grad_weight = tl.sum(grads[v] * window[v], axis=0)
                total += grad_weight[None, :] * hidden[v]
                total_bias += grad_weight
            window = window[1:]
            sums, sums_bias = sums[1:] + (total,), sums_bias[1:] + (total_bias,)  # a full turn after K taps
    for kw in tl.static_range(K):
        row = (program * G + g) * K * K + kh * K + kw
        tl.store(partial_weight_ptr + row * R + r, tl.sum(sums[kw], axis=1), mask=r < R)
        tl.store(partial_bias_ptr + row, tl.sum(sums_bias[kw], axis=0), mask=tl.program_id(2) == 0)


# -------------------------------------------------------------------------------------------------- launchers
# The arguments have been checked. Results have the memory format of the tensor that they stand for.


def probe(device):
    """Raise where kernels cannot be launched: Triton builds a launcher for them with a C compiler."""
    ones = torch.ones(1, device=device)
    _probe[(1,)](ones, ones.stride())


def forward(input, weight, stride, dilation):
    """(N, C, H, W), (N, G, K*K, Ho, Wo) -> (N, C, Ho, Wo)."""
    (N, C, H, W), (G, taps, Ho, Wo) = input.shape, weight.shape[1:]
    output = _empty((N, C, Ho, Wo), input)
    if output.numel() > 0:
        tensors = input, weight, output
        options = _options(tensors, C // G, math.isqrt(taps), stride, dilation)
        with torch.cuda.device_of(input):
            sizes, grid = (H, W, Ho, Wo, G), _grid(N, Ho, Wo, G, options)
            _forward_kernel[grid](*tensors, *_strides(tensors), sizes, **options)
    return output


def grad_input(grad_output, weight, H, W, stride, dilation):
    """(N, C, Ho, Wo), (N, G, K*K, Ho, Wo) -> (N, C, H, W)."""
    (N, C, Ho, Wo), (G, taps) = grad_output.shape, weight.shape[1:3]
    grad = _empty((N, C, H, W), grad_output)
    if grad.numel() > 0:
        tensors = grad_output, weight, grad
        options = _options(tensors, C // G, math.isqrt(taps), stride, dilation)
        with torch.cuda.device_of(grad):
            sizes, grid = (H, W, Ho, Wo, G), _grid(N, H, W, G, options)
            _grad_input_kernel[grid](*tensors, *_strides(tensors), sizes, **options)
    return grad


def grad_weight(grad_output, input, K, G, stride, dilation):
    """(N, C, Ho, Wo), (N, C, H, W) -> (N, G, K*K, Ho, Wo)."""
    (N, C, H, W), (Ho, Wo) = input.shape, grad_output.shape[2:]
    grad = _empty((N, G * K * K, Ho, Wo), input).unflatten(1, (G, K * K))
    if grad.numel() > 0:
        tensors = grad_output, input, grad
        options = _options(tensors, C // G, K, stride, dilation)
        with torch.cuda.device_of(grad):
            sizes, grid = (H, W, Ho, Wo, G), _grid(N, Ho, Wo, G, options)
            _grad_weight_kernel[grid](*tensors, *_strides(tensors), sizes, **options)
    return grad


def fused_forward(input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    """(N, C, H, W), (N, R, Ho, Wo), (G*K*K, R[, 1, 1]), (G*K*K,) -> (N, C, Ho, Wo)."""
    (N, C, H, W), (R, Ho, Wo), G = input.shape, hidden.shape[1:], span_bias.numel() // kernel_size**2
    output = _empty((N, C, Ho, Wo), input)
    if output.numel() > 0:
        hidden, span_weight, span_bias = _fused_layout(hidden, span_weight, span_bias)
        options = _fused_options((input, hidden, output), C // G, R, kernel_size, stride, dilation)
        with torch.cuda.device_of(input):
            tensors = input, hidden, span_weight, span_bias, output
            sizes, grid = (H, W, Ho, Wo, G), _grid(N, Ho, Wo, G, options)
            _fused_forward_kernel[grid](*tensors, *_strides((input, output)), sizes, **options)
    return output


def fused_backward(grad_output, input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    """(N, C, Ho, Wo) and the arguments of `fused_forward` -> the gradients of its four tensors.

    Beside them it needs at most SPAN_PROGRAMS * (R + 1) * K float32 numbers of memory for partial sums, or
    G*K*K * (R + 1) where that is more.
    """
    (N, C, H, W), (R, Ho, Wo), K = input.shape, hidden.shape[1:], kernel_size
    G = span_bias.numel() // K**2
    grad = _empty(input.shape, input)
    if grad.numel() == 0:
        return grad, torch.zeros_like(hidden), torch.zeros_like(span_weight), torch.zeros_like(span_bias)
    hidden, rows, bias = _fused_layout(hidden, span_weight, span_bias)
    options = _fused_options((grad_output, input, hidden, grad), C // G, R, K, stride, dilation)
    grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    columns = min(options["BLOCK_R"], SPAN_COLUMNS)
    most = _grid(N, Ho, Wo, 1, options)({"BLOCK_P": MIN_BLOCK_P})[0]
    span_grid = min(max(1, SPAN_PROGRAMS // (G * K)), most), G * K, triton.cdiv(R, columns)
    partial_weight, partial_bias = (
        torch.empty((span_grid[0], *shape), dtype=_accumulator(input), device=input.device)
        for shape in (rows.shape, bias.shape)
    )
    sizes = H, W, Ho, Wo, G
    with torch.cuda.device_of(input):
        strides = _strides((grad_output, grad))
        _fused_grad_input_kernel[_grid(N, H, W, G, options)](
            grad_output, hidden, rows, bias, grad, *strides, sizes, **options
        )
        strides = _strides((grad_output, input))
        _fused_grad_hidden_kernel[_grid(N, Ho, Wo, 1, options)](
            grad_output, input, rows, grad_hidden, *strides, sizes, **options
        )
        tensors = grad_output, input, hidden, partial_weight, partial_bias
        _fused_grad_span_kernel[span_grid](*tensors, *strides, sizes, N, **options | {"BLOCK_R": columns})
    grad_span_weight = partial_weight.sum(0).to(span_weight.dtype).reshape(span_weight.shape)
    return grad, grad_hidden.permute(0, 3, 1, 2), grad_span_weight, partial_bias.sum(0).to(span_bias.dtype)


def _empty(shape, like):
    """A tensor of the memory format, dtype and device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def _fused_layout(hidden, span_weight, span_bias):
    """hidden as (N, Ho, Wo, R), a copy where it is not channels-last; span_weight as (G*K*K, R)."""
    return (
        hidden.permute(0, 2, 3, 1).contiguous(),
        span_weight.flatten(1).contiguous(),
        span_bias.contiguous(),
    )


def _strides(tensors):
    return [tensor.stride() for tensor in tensors]


def _accumulator(tensor):
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _options(tensors, CG, K, stride, dilation, BLOCK_R=0):
    """The compile-time arguments that all kernels share. The first dimension of `tensors` is the batch."""
    BLOCK_C = triton.next_power_of_2(CG)
    slides = stride == dilation == 1 and K > 1
    spans = [
        sum((size - 1) * step for size, step in zip(tensor.shape[1:], tensor.stride()[1:], strict=True))
        for tensor in tensors
    ]
    return {
        "CG": CG,
        "K": K,
        "stride": stride,
        "dilation": dilation,
        "V": min(STRIP, max(1, STRIP_VALUES // (BLOCK_C + BLOCK_R))) if slides else 1,
        "INDEX": tl.int32 if max(spans) < 2**31 else tl.int64,
        "ACC": tl.float64 if _accumulator(tensors[0]) == torch.float64 else tl.float32,
        "BLOCK_C": BLOCK_C,
    }


def _fused_options(tensors, CG, R, K, stride, dilation):
    BLOCK_R = triton.next_power_of_2(R)
    return _options(tensors, CG, K, stride, dilation, BLOCK_R) | {"R": R, "BLOCK_R": BLOCK_R}


def _grid(N, H, W, G, options):
    """One program for each image, group, and block of strips of H x W pixels."""
    return lambda block: (N * triton.cdiv(H * triton.cdiv(W, options["V"]), block["BLOCK_P"]) * G,)
