"""From a file of rows to packed, labelled training rows, and the prompt templates."""
