"""Quantizers: VQ, FSQ, LFQ, BSQ, IBQ, SimVQ, EMA, residual, product, clustering, Gaussian."""
