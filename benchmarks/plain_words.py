"""Makes src/unstilted/data/plain_words.txt: the 1,000 words that people use most in real chat.

    python benchmarks/plain_words.py CHITCHAT.jsonl.gz > src/unstilted/data/plain_words.txt

CHITCHAT is the BYU chit-chat challenge set (MIT licence; PyPI `chitchat-dataset`): one conversation
a line with its `turns` as [speaker, text], here only counted.
"""

import gzip
import json
import re
import sys
from collections import Counter

if __name__ == "__main__":
    counts: Counter[str] = Counter()
    with gzip.open(sys.argv[1], "rt", encoding="utf-8") as lines:
        for line in lines:
            for _speaker, text in json.loads(line)["turns"]:
                counts.update(re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("\u2019", "'")))
    print("\n".join(sorted(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:1000])))
