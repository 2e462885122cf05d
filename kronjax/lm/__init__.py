"""Language models in JAX: reading, compressing, training, evaluating and writing them.

Reading and writing:
    load: Read a model from a folder of Hugging Face, a GGUF file or the hub.
    save: Write a model with its compressed layers.
    export: Write a model with all layers multiplied out, for other programs.
    read_text: Read a text from a file or a data set.

Compressing and training:
    compress: Replace layers of a model by smaller ones, by a recipe or to a budget.
    measure_moments: Collect second moments of the layers' inputs and gradients.
    train: Train a model, from a teacher if one is given.
    Settings: The settings of a training run.
    Optimizer: The settings of its optimizer.

Evaluating:
    perplexity: Compute the perplexity of a model on a text by a named protocol.
    lambada: Measure how well a model predicts the last words of texts.
    measure_latency: Time a model against itself with dense layers.
    generate: Continue a prompt or a conversation, or several.
    apply_chat_template: Put a conversation into the format of a model.

Each name is imported when it is first used.
"""

from typing import TYPE_CHECKING

from kronjax.lazy import attach

if TYPE_CHECKING:
    from kronjax.lm.checkpoints.hugging_face import export, load, save
    from kronjax.lm.compression.moments import measure_moments
    from kronjax.lm.compression.pipeline import compress
    from kronjax.lm.evaluation.latency import measure_latency
    from kronjax.lm.evaluation.perplexity import lambada, perplexity
    from kronjax.lm.models.generation import apply_chat_template, generate
    from kronjax.lm.text.documents import read_text
    from kronjax.lm.training.settings import Optimizer, Settings
    from kronjax.lm.training.trainer import train

__all__ = [
    "Optimizer",
    "Settings",
    "apply_chat_template",
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
        "kronjax.lm.models.generation": ["apply_chat_template", "generate"],
        "kronjax.lm.text.documents": ["read_text"],
        "kronjax.lm.training.settings": ["Optimizer", "Settings"],
        "kronjax.lm.training.trainer": ["train"],
    },
)
