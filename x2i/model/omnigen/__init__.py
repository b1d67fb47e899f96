"""OmniGen: one transformer over text and images that draws by rectified flow (arXiv 2409.11340)."""
