"""The LlamaGen class of image generators: a Llama over a picture's tokens, row by row, behind a class or a caption."""

from pared_zoo.llamagen.cache import GrowingCache
from pared_zoo.llamagen.original import from_original, to_original
from pared_zoo.llamagen.pipeline import LlamaGenPipeline
from pared_zoo.llamagen.sampling import draw_tokens, guided
from pared_zoo.llamagen.transformer import LlamaGenTransformer

__all__ = [
    "GrowingCache",
    "LlamaGenPipeline",
    "LlamaGenTransformer",
    "draw_tokens",
    "from_original",
    "guided",
    "to_original",
]
