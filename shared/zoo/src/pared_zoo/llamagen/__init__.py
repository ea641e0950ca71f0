"""The LlamaGen class of image generators: a Llama over the tokens of a picture, row by row, behind a class or a caption."""

from pared_zoo.llamagen.cache import GrowingCache
from pared_zoo.llamagen.pipeline import LlamaGenPipeline
from pared_zoo.llamagen.sampling import draw_tokens, guided
from pared_zoo.llamagen.transformer import LlamaGenTransformer

__all__ = ["GrowingCache", "LlamaGenPipeline", "LlamaGenTransformer", "draw_tokens", "guided"]
