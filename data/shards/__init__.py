"""Documents in, tars on disk out, and back: the shard format of docs/shards.md.

`document` is a document in memory and as JSON, `writer` writes shards with their indexes and manifest, `index` and
`tar` find the members of any tar, `reader` reads one sample, and `mmc4` understands MMC4's JSON. Begin at
`document.Document`, then `reader.ShardReader.sample`.
"""
