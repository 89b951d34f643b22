"""The optimizer: Muon (Jordan et al. 2024), orthogonalized momentum.

The gradient of a layer's weights, seen as a matrix [outputs, inputs], is usually dominated by a few directions, and so
are the steps of SGD and AdamW: the layer learns those few first and hardly the rest. Muon keeps the directions of the
step and makes them all equally long: of the momentum's singular value decomposition U S V^T it takes U V^T.

That saves nearly half of the training: EXPERIMENTS.md, Optimizer.

torch.optim.Muon, of torch 2.9 and later, makes the same steps with adjust_lr_fn="match_rms_adamw", but takes no
convolutions, and computes in bfloat16, which many processors lack.
"""
import math

import torch

from utils.ranks import shared_out


# To train with another optimizer: build it here.
def make_optimizers(network, settings):
    """AdamW for all of the network, or Muon for the matrices inside it and AdamW for what is left: biases, and the
    layers that the network names as `for_adamw`, at any depth."""
    for_adamw = set(getattr(network, "for_adamw", ()))
    matrices = {name: p for name, p in network.named_parameters() if settings["optimizer"] == "muon" and p.ndim > 1
                and for_adamw.isdisjoint(name.split("."))}
    others = [p for name, p in network.named_parameters() if name not in matrices]
    common = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    optimizers = []
    if others:
        optimizers.append(torch.optim.AdamW(others, betas=(0.9, 0.99), fused=others[0].device.type != "mps", **common))
    if matrices:
        optimizers.append(Muon(matrices.values(), **common))
    return optimizers


def set_learning_rate(optimizers, settings, step, share):
    """Linear warm-up and cosine decay to 0 over the run, of which `share` is done. Returns the first group's rate."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        peak = group.setdefault("initial_lr", group["lr"])
        # lr = peak min(1, (step + 1) / warmup) (1 + cos(pi share)) / 2;  the cosine: Loshchilov & Hutter 2017, eq. 5
        group["lr"] = peak * min(1, (step + 1) / max(1, settings["warmup"])) * ((1 + math.cos(math.pi * share)) / 2)
    return float(optimizers[0].param_groups[0]["lr"])


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions and linear layers; all else (biases, embeddings, the first and the last
    layer) is better left to AdamW.

    Args:
        params: tensors of two or more dimensions, each seen as a matrix [shape[0], all the rest].
        lr: learning rate, of the same size as for AdamW: a step is scaled to the root mean square of AdamW's steps.
        momentum: of the gradient, by Nesterov's scheme.
        weight_decay: decoupled, as in AdamW.
    Raises:
        ValueError: a tensor of fewer dimensions.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim < 2:
                    raise ValueError(f"Muon is for matrices; this parameter has shape {list(p.shape)}")

    @torch.no_grad()
    def step(self):
        """One step for all parameters that have a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            gradients, mu = [p.grad for p in params], group["momentum"]
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            # M_t = mu M_{t-1} + (1 - mu) G_t;  Nesterov looks one step ahead: mu M_t + (1 - mu) G_t
            torch._foreach_lerp_(momenta, gradients, 1 - mu)
            updates = torch._foreach_lerp(gradients, momenta, mu)

            # Matrices of one shape are made orthogonal together, which is several times as fast.
            together = {}
            for p, update in zip(params, updates):
                together.setdefault((len(p), p[0].numel()), []).append((p, update.flatten(1)))
            for shape, members in together.items():
                orthogonal = shared_out(orthogonalize, torch.stack([update for _, update in members]))
                # An orthogonal matrix has entries of root mean square 1 / sqrt(longer side), AdamW's steps have one of
                # 0.2 to 0.4: Liu et al. 2025 (arXiv 2502.16982), eq. 4.
                scale = 0.2 * math.sqrt(max(shape))
                # W <- (1 - lr weight_decay) W - lr scale U V^T
                for (p, _), update in zip(members, orthogonal):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view(p.shape), alpha=-group["lr"] * scale)


def orthogonalize(matrices):
    """U V^T for each matrix U S V^T, roughly: singular values become numbers from about 0.7 to 1.2 instead of 1, which
    does no harm. Five Newton-Schulz iterations, which need nothing but matrix products.

    Args:
        matrices: float32 or float64 [B, R, C]. (bfloat16 is not exact enough for the products below.)
    Returns:
        the same [B, R, C].
    """
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values are at most 1 now
    # X <- P X with P = a I + b X X^T + c (X X^T)^2, which acts on each singular value alone: a s + b s^3 + c s^5. The
    # numbers are Jordan's: the slope at 0 is as steep as can be while 0.7 to 1.2 is kept. The P of all iterations are
    # multiplied first, and X X^T <- P X X^T P, so that only two products are as wide as X.
    a, b, c = 3.4445, -4.7750, 2.0315
    gram = x @ x.mT
    product = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand_as(gram)
    for iteration in range(5):
        if iteration > 0:
            gram = p @ gram @ p
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        product = p @ product
    x = product @ x
    return x.mT if matrices.shape[1] > matrices.shape[2] else x
