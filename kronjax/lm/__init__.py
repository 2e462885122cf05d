"""Language models in JAX: read from Hugging Face folders, and written to them.

`load` reads a model, `save` writes it with whatever layers it has, `export` multiplies
them out; `compress` makes a smaller one, `train` trains it; `perplexity` and `lambada`
evaluate by named protocols. Names are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from kronjax.lazy import attach

if TYPE_CHECKING:
    from kronjax.lm.checkpoints.hugging_face import export, load, save
    from kronjax.lm.compression.moments import measure_moments
    from kronjax.lm.compression.pipeline import compress
    from kronjax.lm.evaluation.latency import measure_latency
    from kronjax.lm.evaluation.perplexity import lambada, perplexity
    from kronjax.lm.models.generation import generate
    from kronjax.lm.text.documents import read_text
    from kronjax.lm.training.optimizer import Optimizer
    from kronjax.lm.training.settings import Settings
    from kronjax.lm.training.trainer import train

__all__ = [
    "Optimizer",
    "Settings",
    "compress",
    "export",
    "generate",
    "lambada",
    "load",
    "measure_latency",
    "measure_moments",
    "perplexity",
    "read_text",
    "save",
    "train",
]

__getattr__, __dir__ = attach(
    "kronjax.lm",
    {
        "kronjax.lm.checkpoints.hugging_face": ["export", "load", "save"],
        "kronjax.lm.compression.moments": ["measure_moments"],
        "kronjax.lm.compression.pipeline": ["compress"],
        "kronjax.lm.evaluation.latency": ["measure_latency"],
        "kronjax.lm.evaluation.perplexity": ["lambada", "perplexity"],
        "kronjax.lm.models.generation": ["generate"],
        "kronjax.lm.text.documents": ["read_text"],
        "kronjax.lm.training.optimizer": ["Optimizer"],
        "kronjax.lm.training.settings": ["Settings"],
        "kronjax.lm.training.trainer": ["train"],
    },
)
