"""The decoder: its config, layers, LoRA, and the protocol that parallel backends implement."""
