"""Whether modules are still as they were, so that what was derived from them holds."""

from itertools import chain
from operator import attrgetter, is_

import torch


class Unchanged:
    """Modules and all below them, as they are now.

    To look whether they have changed takes little, by lists of what may: classes and attributes of all modules, what is
    in the dictionaries and lists among them, hooks, and where and how tensors lie (`data` may be replaced). It does not
    last where there are hooks, which may hold a network, or tensors without an address (sparse ones).
    """

    def __init__(self, roots):
        self.roots = roots
        self.modules = [m for root in roots for m in root.modules()]
        self.classes, self.attributes = [*map(type, self.modules)], [dict(vars(m)) for m in self.modules]
        self.hooks = [hooks for m in self.modules for hooks in _hooks(m)]
        self.dictionaries = [d for m in self.modules for d in (m._modules, m._parameters, m._buffers)]
        self.contents = _contents(self.dictionaries)
        self.tensors = [x for x in self.contents if isinstance(x, torch.Tensor)]
        self.lists = [x for attributes in self.attributes for x in attributes.values() if type(x) is list]
        self.copies = list(map(list, self.lists))
        try:
            self.places = _places(self.tensors)
        except (RuntimeError, ValueError):  # a tensor has no address, or is not made yet
            self.places = None

    def lasts(self):
        """Whether it may be kept for another pass."""
        return self.places is not None and not any(self.hooks)

    def holds(self, roots):
        """Whether these are the modules that it was made of, unchanged."""
        try:
            if self.roots != roots or any(self.hooks) or [*map(type, self.modules)] != self.classes:
                return False
            if [*map(vars, self.modules)] != self.attributes:
                return False
        except (RuntimeError, ValueError):  # an attribute is another tensor or array, which are not simply equal or not
            return False
        contents = _contents(self.dictionaries)
        same = len(contents) == len(self.contents) and all(map(is_, contents, self.contents))
        return same and _places(self.tensors) == self.places and self.lists == self.copies


def _hooks(m):
    return m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks


def _contents(dictionaries):
    return [*chain.from_iterable(map(dict.values, dictionaries))]


def _places(tensors):
    """Where tensors lie and how; not by their shapes, which take ten times as long to compare."""
    facts = torch.Tensor.data_ptr, torch.Tensor.stride, torch.Tensor.numel, attrgetter("dtype")
    return [*chain.from_iterable(map(fact, tensors) for fact in facts)]
