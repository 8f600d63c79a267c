"""The state-dict keys and shapes of the original DARTS code (github.com/quark0/darts, cnn/), written out as rules.

Kept apart from the code under test: published checkpoints are dictionaries of exactly these entries.
"""


def _bn(prefix, C, affine):
    stats = {f"{prefix}.running_mean": (C,), f"{prefix}.running_var": (C,), f"{prefix}.num_batches_tracked": ()}
    return stats | ({f"{prefix}.weight": (C,), f"{prefix}.bias": (C,)} if affine else {})


def _relu_conv_bn(prefix, C_in, C_out, affine):
    return {f"{prefix}.op.1.weight": (C_out, C_in, 1, 1)} | _bn(f"{prefix}.op.2", C_out, affine)


def _factorized_reduce(prefix, C_in, C_out, affine):
    convs = {f"{prefix}.conv_{i}.weight": (C_out // 2, C_in, 1, 1) for i in (1, 2)}
    return convs | _bn(f"{prefix}.bn", C_out, affine)


def _op(prefix, primitive, C, stride, affine):
    k = int(primitive[-1]) if primitive[-1].isdigit() else 0
    if primitive == "skip_connect" and stride == 2:
        return _factorized_reduce(prefix, C, C, affine)
    if primitive.startswith("sep_conv"):
        keys = {}
        for first in (1, 5):
            keys |= {f"{prefix}.op.{first}.weight": (C, 1, k, k), f"{prefix}.op.{first + 1}.weight": (C, C, 1, 1)}
            keys |= _bn(f"{prefix}.op.{first + 2}", C, affine)
        return keys
    if primitive.startswith("dil_conv"):
        keys = {f"{prefix}.op.1.weight": (C, 1, k, k), f"{prefix}.op.2.weight": (C, C, 1, 1)}
        return keys | _bn(f"{prefix}.op.3", C, affine)
    if primitive == "conv_7x1_1x7":
        return {f"{prefix}.1.weight": (C, C, 1, 7), f"{prefix}.2.weight": (C, C, 7, 1)} | _bn(f"{prefix}.3", C, affine)
    return {}  # none, identity, pooling


def _cells(C, C_prev_prev, C_prev, reduction_prev, classes, layers, multipliers, affine, cell_ops):
    """Cells and classifier; `cell_ops(prefix, C, reduction)` gives the keys of a cell's operations."""
    keys, C_to_auxiliary = {}, None
    for i in range(layers):
        reduction = i in (layers // 3, 2 * layers // 3)
        C *= 2 if reduction else 1
        preprocess0 = _factorized_reduce if reduction_prev else _relu_conv_bn
        keys |= preprocess0(f"cells.{i}.preprocess0", C_prev_prev, C, affine)
        keys |= _relu_conv_bn(f"cells.{i}.preprocess1", C_prev, C, affine)
        keys |= cell_ops(f"cells.{i}", C, reduction)
        reduction_prev = reduction
        C_prev_prev, C_prev = C_prev, multipliers[reduction] * C
        if i == 2 * layers // 3:
            C_to_auxiliary = C_prev
    return keys | {"classifier.weight": (classes, C_prev), "classifier.bias": (classes,)}, C_to_auxiliary


def _small_images(C, *arguments):
    """Stem, cells and classifier of a network for CIFAR."""
    keys, C_to_auxiliary = _cells(C, 3 * C, 3 * C, False, *arguments)
    return {"stem.0.weight": (3 * C, 3, 3, 3)} | _bn("stem.1", 3 * C, True) | keys, C_to_auxiliary


def search_network(C, classes, layers, primitives):
    """Keys of `model_search.Network` (the alphas were kept outside of the state dict)."""

    def cell_ops(prefix, C, reduction):
        keys, edge = {}, 0
        for inputs in range(2, 6):
            for j in range(inputs):
                stride = 2 if reduction and j < 2 else 1
                for k, primitive in enumerate(primitives):
                    name = f"{prefix}._ops.{edge}._ops.{k}"
                    keys |= (
                        _bn(f"{name}.1", C, False) if "pool" in primitive else _op(name, primitive, C, stride, False)
                    )
                edge += 1
        return keys

    return _small_images(C, classes, layers, (4, 4), False, cell_ops)[0]


def _derived(genotype):
    """What `_cells` needs of a genotype: multipliers, affine, cell_ops."""

    def cell_ops(prefix, C, reduction):
        keys = {}
        for k, (primitive, node) in enumerate(genotype.reduce if reduction else genotype.normal):
            keys |= _op(f"{prefix}._ops.{k}", primitive, C, 2 if reduction and node < 2 else 1, True)
        return keys

    return (len(genotype.normal_concat), len(genotype.reduce_concat)), True, cell_ops


def _auxiliary_head(C, classes, last_norm):
    keys = {"auxiliary_head.features.2.weight": (128, C, 1, 1)} | _bn("auxiliary_head.features.3", 128, True)
    keys["auxiliary_head.features.5.weight"] = (768, 128, 2, 2)
    keys |= _bn("auxiliary_head.features.6", 768, True) if last_norm else {}
    return keys | {"auxiliary_head.classifier.weight": (classes, 768), "auxiliary_head.classifier.bias": (classes,)}


def network_cifar(C, classes, layers, auxiliary, genotype):
    """Keys of `model.NetworkCIFAR`."""
    keys, C_to_auxiliary = _small_images(C, classes, layers, *_derived(genotype))
    return keys | (_auxiliary_head(C_to_auxiliary, classes, True) if auxiliary else {})


def network_imagenet(C, classes, layers, auxiliary, genotype):
    """Keys of `model.NetworkImageNet`."""
    keys = {"stem0.0.weight": (C // 2, 3, 3, 3), "stem0.3.weight": (C, C // 2, 3, 3), "stem1.1.weight": (C, C, 3, 3)}
    keys |= _bn("stem0.1", C // 2, True) | _bn("stem0.4", C, True) | _bn("stem1.2", C, True)
    cells, C_to_auxiliary = _cells(C, C, C, True, classes, layers, *_derived(genotype))
    return keys | cells | (_auxiliary_head(C_to_auxiliary, classes, False) if auxiliary else {})
