"""Ovis-U1: a language model that sees images as probable words, and a decoder that draws from its hidden states."""
