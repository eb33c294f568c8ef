"""Ridge regression from running sums: no token is kept, and lambda is chosen by tokens that were held out.

For rows z [columns] that a projection multiplies and e [outputs] that its output lacks, dW minimizes
|z dW - e|^2 + lambda t |dW|^2, so dW = (z'z + lambda t I)^-1 z'e, with t = trace(z'z) / columns.
"""

from dataclasses import dataclass

import torch

# Lambda: from large, where nothing changes, to small; the held-out error has one minimum on the way.
RIDGES = tuple(10 ** (exponent / 2) for exponent in range(2, -11, -1))

BLOCK = 2048  # columns; smaller ones are slower than what they save


class Sums:
    """z'z [columns, columns], z'e [columns, outputs] and |e|^2, in float32.

    Of z'z, which is symmetric, the blocks below the diagonal are summed and the rest is theirs.

    `rounded`: factors may be rounded to bfloat16 before they are multiplied, for that is what their streams were kept
    in; AMX and tensor cores are several times as fast then.
    """

    def __init__(self, columns: int, outputs: int, device: torch.device, *, rounded: bool = False) -> None:
        self.precision = "medium" if rounded else torch.get_float32_matmul_precision()
        self.zz = torch.zeros(columns, columns, device=device)
        self.ze = torch.zeros(columns, outputs, device=device)
        self.ee = 0.0
        self.blocks = [(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]

    def add(self, z: torch.Tensor, e: torch.Tensor) -> None:
        """Add tokens: z [rows, columns], e [rows, outputs], float32."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        for start, stop in self.blocks:
            self.zz[start:stop, :stop].addmm_(z[:, start:stop].T, z[:, :stop])
        self.ze.addmm_(z.T, e)
        torch.set_float32_matmul_precision(before)
        self.ee += e.square().sum(dtype=torch.float64).item()

    def complete(self) -> None:
        """With the blocks above the diagonal too, once no token is added any more."""
        for start, stop in self.blocks:
            self.zz[:start, start:stop] = self.zz[start:stop, :start].T

    def error(self, delta: torch.Tensor) -> float:
        """|z dW - e|^2 with dW [columns, outputs], without any token: |e|^2 - 2 <dW, z'e> + <dW, z'z dW>.

        For sums that are complete.
        """
        inner = (self.zz @ delta).sub_(self.ze, alpha=2)
        return self.ee + float(torch.dot(delta.flatten(), inner.flatten()))


@dataclass(frozen=True)
class Fit:
    """dW [columns, outputs], its lambda, and what share of the held-out squared error it leaves."""

    delta: torch.Tensor
    ridge: float
    error_left: float


def fit(learnt: Sums, held_out: Sums) -> Fit | None:
    """The dW that the held-out tokens like best; None where each makes their error larger."""
    best: Fit | None = None
    least, mean = 1.0, learnt.zz.diagonal().mean()
    if not (held_out.ee > 0 and mean > 0):
        return None
    held_out.complete()
    for ridge in RIDGES:
        if (delta := _solve(learnt, ridge * mean)) is None:
            break
        if (left := held_out.error(delta) / held_out.ee) < least:
            least = max(left, 0.0)
            best = Fit(delta, ridge, least)
        elif best is not None:
            break  # each costs a factorization, and past the minimum they only get worse
    return best


def solved_in(columns: int) -> torch.dtype:
    """Small systems are cheap in float64; the factor of a large one would take twice the memory and time."""
    return torch.float64 if columns <= 4096 else torch.float32


def _solve(sums: Sums, added: torch.Tensor) -> torch.Tensor | None:
    """(z'z + added I)^-1 z'e; None where rounding has made that matrix indefinite."""
    dtype = solved_in(len(sums.zz))
    matrix = sums.zz.to(dtype, copy=True)
    matrix.diagonal().add_(added)
    matrix, failed = torch.linalg.cholesky_ex(matrix)  # by the same name, for the solution copies its factor
    if failed.item():
        return None
    return torch.cholesky_solve(sums.ze.to(dtype), matrix).float()
