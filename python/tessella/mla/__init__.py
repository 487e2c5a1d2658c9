"""Multi-head latent attention: from grouped-query attention to latents, and its formulas.

Plain torch on tensors and modules; no kernel is called from here.
"""
