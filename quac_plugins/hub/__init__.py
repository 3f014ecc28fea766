"""The Hugging Face Hub: adapters and models by name, verified when they arrive, sent in one commit."""
