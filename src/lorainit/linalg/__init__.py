"""Damped inverses and roots, extreme eigenvectors, leading singular triplets; batched.

Everything takes leading batch dimensions and works in the dtype it is given: pass float64 for exact
results, float32 for quick ones. Precision and failure rules, for every function here:

* input that is not finite is an error, never a result;
* a factorization that fails in float32 is tried once more in float64 (on the CPU where the device
  has none), and is an error if it fails there too;
* an iteration runs until its *residual* meets the tolerance; where it does not get there, a dense
  solver finishes the work;
* signs and starting blocks are fixed, so the same input gives the same output.
"""

from __future__ import annotations

from lorainit.linalg.batched import (
    double_precision,
    gram,
    once,
    product,
)
from lorainit.linalg.checks import (
    all_finite,
    check_finite,
    check_rank,
    compute_dtype,
)
from lorainit.linalg.damped_factors import (
    add_to_diagonal,
    damped_cholesky,
    damped_root,
    damping_value,
    solve_triangular,
)
from lorainit.linalg.dense import (
    bottom_singular,
    eigh,
    orthonormal_rows,
    split_evenly,
    svd,
)
from lorainit.linalg.leading import (
    bound_of_operator,
    largest_eigenvalue,
    largest_eigenvectors,
    largest_singular_value,
    smallest_of_operator,
    top_singular,
)
from lorainit.linalg.signs import (
    fix_pair_signs,
    fix_signs,
)
from lorainit.linalg.split_precision import whole_product
from lorainit.linalg.thresholds import (
    block_width,
    dense_limit,
    has_matrix_units,
    iterates,
    on_matrix_units,
)

__all__ = [
    "add_to_diagonal",
    "all_finite",
    "block_width",
    "bottom_singular",
    "bound_of_operator",
    "check_finite",
    "check_rank",
    "compute_dtype",
    "damped_cholesky",
    "damped_root",
    "damping_value",
    "dense_limit",
    "double_precision",
    "eigh",
    "fix_pair_signs",
    "fix_signs",
    "gram",
    "has_matrix_units",
    "iterates",
    "largest_eigenvalue",
    "largest_eigenvectors",
    "largest_singular_value",
    "on_matrix_units",
    "once",
    "orthonormal_rows",
    "product",
    "smallest_of_operator",
    "solve_triangular",
    "split_evenly",
    "svd",
    "top_singular",
    "whole_product",
]
