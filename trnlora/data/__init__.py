"""From files of rows to packed token ids with labels: the prepare_data stage, and the prompt templates."""
