__version__ = "0.1.0"
from . import settle as settle  # teaches transformers to load settled models
