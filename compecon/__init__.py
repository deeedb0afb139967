__version__ = "0.1.0"
from . import settle  # teaches transformers to load settled models
