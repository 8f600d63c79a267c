"""The bilevel optimizer of the alphas (arXiv 1806.09055, section 2.3).

First order:   g = ∇_α L_val(w, α).
Second order ("unrolled"), with the weights after one virtual step of the network's own SGD,

    w' = w − ξ (μ·momentum + ∇_w L_train(w, α) + λ w),                                        (below eq. 6)
    g  = ∇_α L_val(w', α) − ξ ∇²_{α,w} L_train(w, α) · v,        v = ∇_{w'} L_val(w', α)        (eq. 7)
    ∇²_{α,w} L_train · v ≈ [∇_α L_train(w + εv, α) − ∇_α L_train(w − εv, α)] / 2ε,  ε = 0.01/‖v‖   (eq. 8)

The weights are moved in place and put back bit for bit: there is no second model. Batch norm's running statistics
(all buffers) are put back too. Of several processes, each takes the derivatives on its share of the images; w', v and
the difference are made of their means over all (gradients.py), and are the same in all.

Where the network draws at random (drop path, noise), L_train is the loss of one draw: the passes at w, w + εv and
w − εv drop the same paths and see the same noise. Eq. 7 differentiates one function, and the difference of two draws
over 2ε would be their noise, magnified.
"""

import torch

from gradients import Gradients, Kept, from_random_states, random_states

_R = 0.01  # ε = _R / ‖v‖, as in the paper


class Architect:
    """Adam on the alphas of a supernet.

    Args:
        model: a `model_search.Network`.
        args: has `momentum`, `weight_decay` (those of the network's SGD), `arch_learning_rate`,
            `arch_weight_decay`.
        gradients: how to compute them, by default `Gradients(model)`. The two gradients of the finite difference are
            always computed in float32: it is smaller than the rounding of bfloat16 or TF32.
    """

    def __init__(self, model, args, gradients=None):
        self.model = model
        self.gradients = gradients or Gradients(model)
        self._weights = Kept(self.gradients.weights)
        self.network_momentum = args.momentum
        self.network_weight_decay = args.weight_decay
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(),
            lr=args.arch_learning_rate,
            betas=(0.5, 0.999),
            weight_decay=args.arch_weight_decay,
        )

    def step(self, input_train, target_train, input_valid, target_valid, eta, network_optimizer, unrolled):
        """Update the alphas once; their `.grad` then holds the bilevel gradient that was applied.

        Args:
            input_*: (N, 3, H, W); target_*: (N,).
            eta: ξ, the learning rate of the virtual step.
            network_optimizer: the SGD of the weights, for its momentum buffers.
            unrolled: second order if true, else first order.

        Raises:
            FloatingPointError: the gradient is not finite; the alphas are as they were.
        """
        train, valid = (input_train, target_train), (input_valid, target_valid)
        with self.gradients.buffers.kept():
            if unrolled:
                grads = self._unrolled_grads(train, valid, eta, network_optimizer)
            else:
                grads = [grad.clone() for grad in self.gradients("alphas", *valid)[2]]
        if not all(grad.isfinite().all() for grad in grads):
            raise FloatingPointError("the gradient of the alphas became infinite or NaN")
        for alpha, grad in zip(self.model.arch_parameters(), grads, strict=True):
            alpha.grad = grad
        self.optimizer.step()

    def _unrolled_grads(self, train, valid, eta, network_optimizer):
        alphas, draws = len(self.gradients.alphas), random_states(train[0].device)
        with self._weights.kept():
            self._virtual_step(train, eta, network_optimizer)
            grads = self.gradients("both", *valid)[2]  # at w'
            self._weights.put_back()
            implicit = self._hessian_vector_product(grads[alphas:], train, draws)
        return [g - eta * h for g, h in zip(grads[:alphas], implicit, strict=True)]

    @torch.no_grad()
    def _virtual_step(self, train, eta, network_optimizer):
        """w <- w', in place."""
        weights = self.gradients.weights
        with torch.enable_grad():
            grads = self.gradients("weights", *train)[2]
        torch._foreach_add_(grads, weights, alpha=self.network_weight_decay)
        momenta = [network_optimizer.state.get(w, {}).get("momentum_buffer") for w in weights]
        moving = [(grad, momentum) for grad, momentum in zip(grads, momenta, strict=True) if momentum is not None]
        if moving:  # not before the first step
            torch._foreach_add_(*map(list, zip(*moving, strict=True)), alpha=self.network_momentum)
        torch._foreach_sub_(weights, grads, alpha=float(eta))

    @torch.no_grad()
    def _hessian_vector_product(self, vector, train, draws):
        """∇²_{α,w} L_train · vector by a central difference around w, both times from the random states `draws`."""
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(vector)))
        epsilon = float(_R / norm) if norm > 0 else _R  # a zero vector has a zero product
        product = [torch.zeros_like(alpha) for alpha in self.gradients.alphas]
        for sign in (1, -1):
            torch._foreach_add_(self.gradients.weights, vector, alpha=sign * epsilon)
            with torch.enable_grad(), from_random_states(train[0].device, draws):
                grads = self.gradients("alphas", *train, precise=True, mean=False)[2]  # at w±
            self._weights.put_back()
            torch._foreach_add_(product, grads, alpha=sign)
        self.gradients.team.mean_(product, len(train[1]))  # that of a difference: once
        return [difference / (2 * epsilon) for difference in product]
