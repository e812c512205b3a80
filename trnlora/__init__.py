"""LoRA fine-tuning of Llama-like models with tensor parallelism on AWS Trainium or a CPU, and serving with vLLM."""

__version__ = "0.2.0"
