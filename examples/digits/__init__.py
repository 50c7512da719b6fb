"""A vision transformer learns to read handwritten digits, on the fused operator and on Paddle's own layers, from equal
weights.

The data are the 1797 images of scikit-learn. Both models see the same batches in the same order, so that without
dropout their loss curves agree; the program draws them and says by how much they differ.

    python -m examples.digits [--attention fused | plain | both] [--epochs N] [--dropout P] [--resume]
        [--output DIRECTORY]
"""
