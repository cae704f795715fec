"""A world whose words follow from its images: unlimited, seeded, no two images alike.

`scenes` draws coloured shapes with captions, questions and answers; `glyphs` draws instances of made-up characters, a
thousand classes for training and others held out; `clips` moves a shape; `names` makes names out of syllables. `drafts`
lays them out as documents of images and text, `text_documents` as documents of text alone, and `vocabulary` builds the
tokenizer that knows every word of it. numpy and Pillow suffice: nothing here imports torch.

Everything is a pure function of (seed, split, kind, index), so a document can be made again alone, on any machine.
"""
