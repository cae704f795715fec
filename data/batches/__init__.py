"""Samples in, the tensors of one objective out: tokenized, cropped, decoded, packed and padded.

`collate` has a class for each objective and calls the others: `tokenize` makes a row of tokens and says which image
each token sees, `decode` makes its images, `packing` joins short rows. Begin at `collate.FlamingoCollate`.
"""
