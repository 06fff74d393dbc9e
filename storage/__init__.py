"""Content and where its bytes lie: digests, names, manifests, and the drivers that keep blobs."""
