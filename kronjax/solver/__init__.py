"""The continuation in p on the manifold of fixed Kronecker rank."""
