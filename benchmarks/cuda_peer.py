"""A straight CUDA kernel of involution that reads a given weight tensor: the peer of the Triton backend.

It has the formulation of the involution authors' kernel (github.com/d-li14/involution: one thread for each
element of the result, NCHW, a loop over the K*K taps), written anew: theirs is float32 on CuPy, this takes
bfloat16 too, with float32 sums. For the benchmark alone; compiled at first use by PyTorch's own NVRTC.
"""

import functools
import math

import torch

SOURCE = """
struct bfloat16 {
    unsigned short bits;
    __device__ operator float() const { return __uint_as_float((unsigned)bits << 16); }
    __device__ void operator=(float x) {  // to the nearest, ties to even
        unsigned u = __float_as_uint(x);
        bits = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    }
};

#define SIZES int N, int C, int H, int W, int G, int K, int Ho, int Wo, int s, int d
#define INDEX(C, H, W)                                                  \\
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;     \\
    if (i >= (long long)N * (C) * H * W) return;                        \\
    int w = i % W, h = i / W % H, c = i / W / H % (C), n = i / W / H / (C);

extern "C" __global__ void forward(const T* input, const T* weight, T* output, SIZES) {
    INDEX(C, Ho, Wo)
    int g = c / (C / G);
    float sum = 0;
    for (int kh = 0; kh < K; ++kh) {
        for (int kw = 0; kw < K; ++kw) {
            int y = h * s + (kh - K / 2) * d, x = w * s + (kw - K / 2) * d;
            if (y < 0 || y >= H || x < 0 || x >= W) continue;
            sum += (float)weight[((((long long)n * G + g) * K * K + kh * K + kw) * Ho + h) * Wo + w] *
                   (float)input[(((long long)n * C + c) * H + y) * W + x];
        }
    }
    output[i] = sum;
}

extern "C" __global__ void grad_input(const T* grad_output, const T* weight, T* grad, SIZES) {
    INDEX(C, H, W)
    int g = c / (C / G);
    float sum = 0;
    for (int kh = 0; kh < K; ++kh) {
        for (int kw = 0; kw < K; ++kw) {
            int y = h - (kh - K / 2) * d, x = w - (kw - K / 2) * d;
            if (y < 0 || y % s || (y /= s) >= Ho || x < 0 || x % s || (x /= s) >= Wo) continue;
            sum += (float)weight[((((long long)n * G + g) * K * K + kh * K + kw) * Ho + y) * Wo + x] *
                   (float)grad_output[(((long long)n * C + c) * Ho + y) * Wo + x];
        }
    }
    grad[i] = sum;
}

extern "C" __global__ void grad_weight(const T* grad_output, const T* input, T* grad, SIZES) {
    INDEX(G * K * K, Ho, Wo)
    int g = c / (K * K), kh = c / K % K, kw = c % K;
    int y = h * s + (kh - K / 2) * d, x = w * s + (kw - K / 2) * d;
    float sum = 0;
    if (y >= 0 && y < H && x >= 0 && x < W)
        for (c = g * (C / G); c < (g + 1) * (C / G); ++c)
            sum += (float)grad_output[(((long long)n * C + c) * Ho + h) * Wo + w] *
                   (float)input[(((long long)n * C + c) * H + y) * W + x];
    grad[i] = sum;
}
"""
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
THREADS = 256


def available():
    """Whether this PyTorch can compile kernels."""
    return hasattr(torch.cuda, "compile_kernel") or hasattr(torch.cuda, "_compile_kernel")


def involution2d(input, weight, stride=1, dilation=1):
    """As `involution.involution2d`, on CUDA in float32 or bfloat16, and differentiable once.

    Raises:
        ValueError: a tensor of another device or dtype.
    """
    if not input.is_cuda or input.dtype not in TYPES:
        raise ValueError(f"input must be float32 or bfloat16 on CUDA, got {input.dtype} on {input.device}")
    return _Involution.apply(input, weight, stride, dilation)


class _Involution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, stride, dilation):
        ctx.save_for_backward(input, weight)
        ctx.sizes = _sizes(input, weight, stride, dilation)
        output = input.new_empty(*input.shape[:2], *weight.shape[3:])
        return _launch("forward", input, weight, output, ctx.sizes)

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        to_input, to_weight = (tensor.new_empty(tensor.shape) for tensor in (input, weight))
        if ctx.needs_input_grad[0]:
            _launch("grad_input", grad_output, weight, to_input, ctx.sizes)
        if ctx.needs_input_grad[1]:
            _launch("grad_weight", grad_output, input, to_weight, ctx.sizes)
        return to_input, to_weight, None, None


def _sizes(input, weight, stride, dilation):
    """N, C, H, W, G, K, Ho, Wo, s, d: the kernels' integers."""
    return *input.shape, weight.shape[1], math.isqrt(weight.shape[2]), *weight.shape[3:], stride, dilation


def _launch(name, first, second, result, sizes):
    blocks = -(-result.numel() // THREADS)
    if blocks > 0:
        tensors = [first.contiguous(), second.contiguous(), result]
        _kernel(name, result.dtype)(grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=[*tensors, *sizes])
    return result


@functools.cache
def _kernel(name, dtype):
    compile_kernel = getattr(torch.cuda, "compile_kernel", None) or torch.cuda._compile_kernel
    return compile_kernel(SOURCE.replace("T*", f"{TYPES[dtype]}*"), name)
