"""Takes personal data out of prompts before a model sees them."""
