"""Sums of Kronecker products, fitted to matrices in the spectral norm.

`approximate` solves one matrix or a batch, `solve` is the pure function inside it,
`Configuration` states the form of the sum. `certify` proves how good a sum is, `search`
chooses a form, `preconditioner` fits a symmetric sum to an operator, `factorize` solves
all matrices of a file or folder, `cache` keeps compiled programs. Names are loaded when
they are first used, so that the command line answers before jax is imported.
"""

from typing import TYPE_CHECKING

from kronjax.lazy import attach

if TYPE_CHECKING:
    from kronjax.approximation import Approximation, approximate
    from kronjax.io.compilation_cache import cache
    from kronjax.kronecker import Configuration, KroneckerTerms
    from kronjax.operators.preconditioning import Preconditioner, preconditioner
    from kronjax.proof.certificate import Certificate, certify
    from kronjax.runs.factorize import factorize
    from kronjax.selection import search
    from kronjax.solver.continuation import solve
    from kronjax.solver.descent import Status

__version__ = "0.1.0"

__all__ = [
    "Approximation",
    "Certificate",
    "Configuration",
    "KroneckerTerms",
    "Preconditioner",
    "Status",
    "approximate",
    "cache",
    "certify",
    "factorize",
    "preconditioner",
    "search",
    "solve",
]

__getattr__, __dir__ = attach(
    "kronjax",
    {
        "kronjax.approximation": ["Approximation", "approximate"],
        "kronjax.io.compilation_cache": ["cache"],
        "kronjax.kronecker": ["Configuration", "KroneckerTerms"],
        "kronjax.operators.preconditioning": ["Preconditioner", "preconditioner"],
        "kronjax.proof.certificate": ["Certificate", "certify"],
        "kronjax.runs.factorize": ["factorize"],
        "kronjax.selection": ["search"],
        "kronjax.solver.continuation": ["solve"],
        "kronjax.solver.descent": ["Status"],
    },
)
