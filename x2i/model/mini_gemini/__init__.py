"""Mini-Gemini: a language model that sees through two encoders and draws through SDXL (arXiv 2403.18814)."""
