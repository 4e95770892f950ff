"""The preconditioned step: the gradient of one factor, times the inverse Gram matrix of the other factor, which is frozen.

With A frozen, a step of B changes the weight by `-rate s g_B A`, where `g_B = s G A^T` for the gradient `G` `[out, in]` of the
weight: `-rate s^2 G A^T A`, which is stretched along the rows of A as A happens to be drawn. With `g_B (s^2 A A^T)^-1`, the
change is `-rate G P` for the projection P onto the rows of A, the closest that B can come to a step on the weight itself. The
step then depends on the row space of A alone: A may be replaced by `M A` for any invertible M, and the scaling by any other.
(LoRA-FA: Zhang et al. 2023, arXiv 2308.03303, in the form of PEFT's optimizer; for both factors: Zhang and Pilanci 2024, arXiv
2402.02347.) With B frozen, `(s^2 B^T B)^-1 g_A` likewise. Both factors at once are refused: B is zero at the start.

Under differential privacy, the gradient is clipped and noised before, so that the guarantee holds by post-processing, A being
public. The noise in the weight is then `N (s^2 A A^T)^-1 s A`: of size 1/(s sigma_i) along the i-th singular direction of A,
most where A is smallest, while noise without the preconditioner has size `s sigma_i`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyrank.config.sections import TrainConfig
from anyrank.errors import ModelError
from anyrank.messages.records import Download

_RIDGE = 1e-6  # of the trace of the Gram matrix: bounds the inverse where rows of A are dependent


@dataclass(frozen=True, eq=False)
class Inverse:
    """What a gradient is multiplied by: `matrix` `[rank, rank]`, or one for each client, `[clients, rank, rank]`.

    `left`: the gradient is that of A `[rank, in]`, not that of B `[out, rank]`.
    """

    matrix: Tensor
    left: bool

    def __call__(self, gradient: Tensor) -> Tensor:
        wide = gradient.to(self.matrix.dtype)
        return (self.matrix @ wide if self.left else wide @ self.matrix).to(gradient.dtype)

    def select(self, index: Tensor) -> Inverse:
        """The matrices of the clients `index`."""
        return Inverse(self.matrix[index], self.left)


def inverse(A: Tensor, B: Tensor, scaling: float | Tensor, train: frozenset[str]) -> Inverse:
    """For a layer's factors A `[..., rank, in]` and B `[..., out, rank]`, of which `train` names the trained one.

    `(s^2 F F^T + ridge I)^-1` for the frozen factor F, computed in float64; the ridge is 1e-6 of the trace, or 1 where the
    frozen factor is zero. Raises `ModelError` if both factors are trained.
    """
    if len(train) != 1:
        raise ModelError("train.precondition: expected a download that trains A or B, got one that trains both")
    frozen = (A if train == {"B"} else B.mT).detach().cpu().double()
    scale = scaling.detach().cpu().double() if isinstance(scaling, Tensor) else scaling
    gram = scale**2 * frozen @ frozen.mT
    ridge = _RIDGE * gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    ridge = torch.where(ridge > 0, ridge, 1.0)[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype)
    # in float64 where the device has it: where rows are dependent, the inverse has entries of a million
    wide = torch.float32 if A.device.type == "mps" else torch.float64
    return Inverse(torch.linalg.inv(gram + ridge).to(wide).to(A.device), left=train == {"A"})


def of_download(download: Download, config: TrainConfig, device: torch.device) -> Sequence[Inverse]:
    """One for each layer of `download`, in its order, on `device`; none if `config` asks for no preconditioner."""
    if not config.precondition:
        return ()
    layers = download.adapter.layers.values()
    return [inverse(layer.A.to(device), layer.B.to(device), layer.scaling, download.train) for layer in layers]
