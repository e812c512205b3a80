"""What the pipeline's stages share: params, layouts, the one Llama, its parallel layers, data, scores, serving."""

__version__ = "0.2.0"
