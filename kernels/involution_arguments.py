"""The arguments of an involution: what they must be, and what is read off them. Shared by all of involution*.py.

Every check raises ValueError, or returns the stride and dilation to compute with: both at most the image's longer side.
Past it they change nothing any more (a single output pixel, a single tap inside), but would overflow 64 bits.
"""

import torch


def check(input, weight, stride, dilation):
    """For involution2d."""
    _check_image("input", input)
    steps = _check_weight(input.shape, weight, stride, dilation)
    _check_same("input", input, weight=weight)
    return steps


def check_backward(grad_output, input, weight, stride, dilation):
    steps = check(input, weight, stride, dilation)
    _check_grad_output(grad_output, input.shape, stride)
    _check_same("input", input, grad_output=grad_output)
    return steps


def check_grad_input(grad_output, weight, H, W, stride, dilation):
    _check_image("grad_output", grad_output)
    image = (*grad_output.shape[:2], H, W)
    steps = _check_weight(image, weight, stride, dilation)
    _check_grad_output(grad_output, image, stride)
    _check_same("grad_output", grad_output, weight=weight)
    return steps


def check_grad_weight(grad_output, input, K, G, stride, dilation):
    check_counts(K=K, G=G, stride=stride, dilation=dilation)
    check_odd(K=K)
    _check_image("input", input)
    if input.shape[1] % G:
        raise ValueError(f"G must divide the input's {input.shape[1]} channels, got {G}")
    _check_grad_output(grad_output, input.shape, stride)
    _check_same("input", input, grad_output=grad_output)
    return _within(input.shape, stride, dilation)


def check_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    """For involution2d_fused."""
    check_counts(kernel_size=kernel_size, stride=stride, dilation=dilation)
    check_odd(kernel_size=kernel_size)
    _check_image("input", input)
    K, (N, C) = kernel_size, input.shape[:2]
    if hidden.dim() != 4 or hidden.shape[1] < 1:
        raise ValueError(f"hidden must be (N, C_hidden, Ho, Wo), got shape {tuple(hidden.shape)}")
    expected = (N, hidden.shape[1], *_output_size(input.shape, stride))
    if hidden.shape != expected:
        raise ValueError(f"hidden must have shape {expected} for this input and stride, got {tuple(hidden.shape)}")
    outputs = span_weight.shape[0] if span_weight.dim() in (2, 4) else 0
    if outputs < 1 or span_weight.shape[1:] not in (expected[1:2], (*expected[1:2], 1, 1)):
        shape = tuple(span_weight.shape)
        raise ValueError(f"span_weight must be (K*K*G, {expected[1]}) or that of a 1x1 convolution, got shape {shape}")
    if outputs % (K * K) or C % (outputs // (K * K)):
        raise ValueError(f"span_weight must have K*K*G rows with K = {K} and G a divisor of {C}, got {outputs} rows")
    if span_bias.shape != (outputs,):
        raise ValueError(f"span_bias must have shape {(outputs,)}, got {tuple(span_bias.shape)}")
    _check_same("input", input, hidden=hidden, span_weight=span_weight, span_bias=span_bias)
    return _within(input.shape, stride, dilation)


def check_fused_backward(grad_output, input, hidden, span_weight, span_bias, kernel_size, stride, dilation):
    steps = check_fused(input, hidden, span_weight, span_bias, kernel_size, stride, dilation)
    _check_grad_output(grad_output, input.shape, stride)
    _check_same("input", input, grad_output=grad_output)
    return steps


def check_counts(**counts):
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_odd(**sizes):
    for name, value in sizes.items():
        if value % 2 == 0:
            raise ValueError(f"{name} must be odd, got {value}")


def _check_image(name, image):
    if image.dim() != 4:
        raise ValueError(f"{name} must be (N, C, H, W), got shape {tuple(image.shape)}")
    if not image.is_floating_point():
        raise ValueError(f"{name} must be of a floating-point dtype, got {image.dtype}")


def _check_weight(image, weight, stride, dilation):
    """For an image of shape (N, C, H, W)."""
    check_counts(stride=stride, dilation=dilation)
    if weight.dim() != 5:
        raise ValueError(f"weight must be (N, G, K*K, Ho, Wo), got shape {tuple(weight.shape)}")
    N, C, G, K = *image[:2], weight.shape[1], kernel_size_of(weight)
    if K * K != weight.shape[2] or K % 2 == 0:
        raise ValueError(f"weight must hold K*K taps with K odd in dimension 2, got {weight.shape[2]}")
    if G < 1 or C % G:
        raise ValueError(f"weight's groups must divide the input's {C} channels, got {G} groups")
    expected = (N, G, K * K, *_output_size(image, stride))
    if weight.shape != expected:
        raise ValueError(f"weight must have shape {expected} for this input and stride, got {tuple(weight.shape)}")
    return _within(image, stride, dilation)


def _check_grad_output(grad_output, image, stride):
    expected = (*image[:2], *_output_size(image, stride))
    if grad_output.shape != expected:
        raise ValueError(f"grad_output must have shape {expected}, got {tuple(grad_output.shape)}")


def _check_same(like, image, **others):
    for name, tensor in others.items():
        if tensor.dtype != image.dtype:
            raise ValueError(f"{name} must have the {like}'s dtype {image.dtype}, got {tensor.dtype}")
        if tensor.device != image.device:
            raise ValueError(f"{name} must be on the {like}'s device {image.device}, got {tensor.device}")


def _output_size(image, stride):
    return -(-image[2] // stride), -(-image[3] // stride)


def _within(image, stride, dilation):
    longest = max(image[2], image[3], 1)
    return min(stride, longest), min(dilation, longest)


def kernel_size_of(weight):
    """K of (N, G, K*K, Ho, Wo). Not by math.isqrt, which torch.compile cannot trace for a size that varies."""
    return int(weight.shape[2] ** 0.5)


def memory_format(image):
    """Channels-last where an image's channels are neighbours in memory, as in a crop of a channels-last image."""
    last = not image.is_contiguous() and image.stride(1) == 1 and image.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def autocast(*tensors):
    """Under autocast an involution runs in the low precision, as convolutions do: all but float64."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )
