"""A BERT of PaddleNLP is fine-tuned as a classifier, as it is and after ``convert``, from equal weights.

The task is made up here, and nothing is downloaded: each sequence has more words of one half of the vocabulary than of
the other, and its class says of which. Both runs see the same batches in the same order. The program prints what each
took, how it learnt, and what ``convert`` did.

    python -m examples.fine_tuning [--steps N] [--layers N] [--hidden-size E] [--seq-len S] [--batch-size B]
        [--dropout P] [--seed S]
"""
