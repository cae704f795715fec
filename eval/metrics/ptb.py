"""Captions to words as published caption scores have them: the Penn Treebank rules of Stanford's tokenizer, no Java.

CIDEr, BLEU and ROUGE-L of a paper are those of captions tokenised by CoreNLP 3.4.1 (lower-cased, one caption a line)
and freed of a list of punctuation marks. Other tokenizers change CIDEr by tens of points. Some rules
are surprising:

- Lower-casing comes after tokenising, and the list of marks has "-LRB-": so the token "-lrb-" of a "(" stays, as do
  "-lsb-" and "-lcb-". Only single marks are removed: "??" and "!!" are words.
- "can't" is "ca n't", "cannot" is "can not", "gonna" is "gon na", "dog's" is "dog 's"; "o'clock" is one word.
- Abbreviations keep their dot ("mr.", "p.m."), some only before a number ("no. 5"), some only in one letter case.
- "half-eaten", "a/b" and "3-year-old" are one word, "a&b" three, "AT&T" one.

The tokenizer is a longest-match lexer: of all rules that match at a position the one that reaches farthest wins (what
it looks ahead at counts), of equals the earlier one. `RULES` are in that order. Text that no rule knows is dropped. The
equality with the Java program is tested where both are installed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Single tokens that the caption scorers leave out, besides the upper-case brackets that never occur."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CURRENCY = {"¢": "cents", "£": "#", "¤": "$", "€": "$", "\x80": "$", "₠": "$"}
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_LATEX = str.maketrans(
    dict.fromkeys("\x91\u2018\u201b\u2039", "`")
    | dict.fromkeys("\x92\u2019\u203a", "'")
    | dict.fromkeys("\x93\u201c«", "``")
    | dict.fromkeys("\x94\u201d»", "''")
)
_PASSED_OVER = re.compile(r"[ \t\r\n\f\v\u00a0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_PLAIN = re.compile(r"[a-zß-öø-ÿ]+(?=[,;]?(?: |$))")  # a word that only _SPECIAL may split
_SPECIAL = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
SOFT_HYPHEN = "\u00ad"
NBSP = "\u00a0"
"""Replaces the space inside a token such as a telephone number."""


@dataclass(frozen=True)
class LexerRule:
    """`pattern` matches the token and, after group 1, what must follow; `make` spells the token."""

    pattern: re.Pattern[str]
    make: Callable[[str], str] = str
    keep: int | None = None  # this many last characters are read again (the "not" of "cannot")


_APOS = "(?:['\x92\u2019]|&apos;)"
_APOS_WIDE = f"(?:{_APOS}|[`\x91\u2018\u201b])"
# Which characters are letters, digits and symbols to the Java program, as differences from Python's classes: found by
# running it on every character of the BMP. It knows Unicode as it was in 2013, and nothing beyond the BMP.
_NOT_LETTERS = (  # numbers that are not digits, and letters that came later
    r"²³¹¼-¾\u037f\u0528-\u052f\u0560\u0588\u05ef\u0860-\u088e\u08a1\u08ad-\u08c9\u0978\u0980\u09f4-\u09fc\u0af9"
    r"\u0b72-\u0b77\u0bf0-\u0bf2\u0c34\u0c5a-\u0c5d\u0c78-\u0c80\u0cdd\u0d04\u0d54-\u0d5f\u0d70-\u0d78\u0e86\u0e89\u0e8c"
    r"\u0e8e-\u0e93\u0e98\u0ea0\u0ea8-\u0ea9\u0eac\u0f2a-\u0f33\u1369-\u137c\u13f5-\u13fd\u16ee-\u16f8\u170d\u171f"
    r"\u17f0-\u17f9\u1878\u191d-\u191e\u19b0-\u19c0\u19c8-\u19da\u1b4c\u1c80-\u1cbf\u1cf2-\u1cf3\u1cfa⁰⁴-⁹₀-₉"
    r"\u2150-\u2182\u2185-\u2793\u2c2f\u2c5f\u2cfd\u3007-\u3029\u3038-\u303a\u312e-\u312f\u3192-\u3195\u31bb-\u31bf"
    r"\u3220-\u32bf\u4db6-\u4dbf\u9fcd-\u9fff\ua698-\ua69d\ua6e6-\ua6ef\ua78f\ua794-\ua79f\ua7ab-\ua7f7\ua830-\ua835"
    r"\ua8fd-\ua8fe\ua9e0-\ua9fe\uaa7e-\uaa7f\uab30-\uabbf\U00010000-\U0010ffff"
)
_LETTERS_TOO = (  # the soft hyphen, accents on their own, vowel signs of some Indic scripts, of Thai and Lao
    r"\u00ad\u02c2-\u0375\u0384-\u0385\u03f6\u0483-\u0487\u055a-\u055f\u0591-\u05bd\u05bf\u05c1-\u05c2\u05c4-\u05c5\u05c7"
    r"\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06ed\u06fd-\u06fe\u070f-\u07b0\u07eb-\u07f3\u0900-\u0903\u093c-\u094e"
    r"\u0951-\u0955\u0962-\u0963\u0981-\u09e3\u0a01-\u0a4d\u0a81-\u0acd\u0b82-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56"
    r"\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd"
)
_NOT_DIGITS = r"\u0de6-\u0def\ua9f0-\ua9f9\U00010000-\U0010ffff"
_SYMBOLS = (  # tokens of their own, where no rule makes more of them
    r"\u037e\u0387\u0589\u05be-\u05c6\u05f3-\u0603\u0606-\u060c\u0614-\u061b\u061e-\u061f\u066a\u066d-\u07f8\u0964-\u0965"
    r"\u0e3f-\u0e4f\u1fbd\u2016-\u2017\u201a\u201e-\u2023\u2031-\u2038\u203b\u203e-\u2042\u2044\u207a-\u208e\u2100-\u214f"
    r"\u2190-\u2bff\u3012\u30fb\uff01-\uffe1\uffe5-\uffe6"
)
_PLAIN_LETTER = rf"(?:[a-zA-Z\u1885\u1886]|(?![{_NOT_LETTERS}])[^\W\d_])"
_LETTER = rf"(?:{_PLAIN_LETTER}|[{_LETTERS_TOO}])"
_DIGIT = rf"(?:[0-9]|(?![{_NOT_DIGITS}])\d)"
_PLAIN_ALNUM = f"(?:{_PLAIN_LETTER}|{_DIGIT})"
_ALNUM = f"(?:{_LETTER}|{_DIGIT})"
_WORD = rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"
_POINT = r"[.:,\u00ad\u066b\u066c]"
_NUM = rf"(?:{_DIGIT}*(?:{_POINT}{_DIGIT}+)+|{_DIGIT}+(?:{_POINT}{_DIGIT}+)*)"
_NUMBER = rf"(?:[-+]?{_NUM})"
_AUXILIARY = f"{_APOS}(?:[msdMSD]|(?i:re|ve|ll))"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_ACRO = r"(?:[A-Za-z](?:\.[A-Za-z])*|(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)))"
_ACRO2 = _ACRO.replace(r"\.[A-Za-z])*", r"\.[A-Za-z])+", 1)
_FRENCH = f"[dDoOlL]{_APOS_WIDE}"
_THING = rf"(?:{_FRENCH}{_PLAIN_ALNUM})?{_PLAIN_ALNUM}+(?:{_HYPHEN}(?:{_FRENCH}{_PLAIN_ALNUM})?{_PLAIN_ALNUM}+)*"
_HTHING = rf"[A-Za-z0-9][A-Za-z0-9.,]*(?:-(?:{_ACRO2}\.|[A-Za-z0-9]+))+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}"
_JOINED = r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+"
_APOSTROPHE_WORD = (
    rf"{_APOS}n{_APOS}?|[lLdDjJ]{_APOS}|(?i:Dunkin|somethin|ol){_APOS}|{_APOS}(?i:em)|"
    rf"[A-HJ-XZn]{_APOS_WIDE}{_LETTER}{{2,}}|{_APOS}[2-9]0(?i:s)|{_APOS}(?i:till?)|"
    rf"{_LETTER}+[aeiouyAEIOUY]{_APOS_WIDE}[aeiouA-Z]{_LETTER}*|{_APOS}(?i:cause)|(?i:cont'd\.?|'twixt|nor'easter|"
    rf"c'mon|e'er|s'mores|ev'ry|li'l|nat'l)|[Oo]{_APOS_WIDE}[Oo]"
)
_ABBREVIATION = (  # kept with their dot
    "Jan Feb Mar Apr Jun Jul Aug Sep Sept Oct Nov Dec Mon Tue Tues Wed Thu Thurs Fri Ala Ariz [A]z [A]rk Calif Colo "
    "Conn Ct Dak [D]el Fla Ga [I]ll Ind Kans? Ky [L]a [M]ass Md Mich Minn [M]iss Mo Mont Neb Nev Okla [O]re [P]a Penn "
    "Tenn [T]ex Va Vt [W]ash Wisc? Wyo Inc Cos? Corp Pp?t[ye]s? Ltd Plc Rt Bancorp Dept Bhd Assn Univ Intl Sys tel est "
    r"ext sq Jr Sr Bros (?:Ed|Ph)\.D Blvd Rd Esq etc al seq Bldg "
    "Mr Mrs Ms [M]iss Drs? Profs? Sens? Reps? Attys? Lt Col Gen Messrs Govs? Adm Rev Maj Sgt Cpl Pvt Mt Capt Ste? Ave "
    r"Pres Lieut Hon Brig Co?mdr Pfc Spc Supts? Det Ft Adj Adv Asst Assoc Ens Insp Mlle Mme Msgr Sfc vs Alex Wm "
    r"Jos Cie a\.k\.a cf TREAS Ph Invt Elec Natl M[ft]g "
)
_BEFORE_NUMBERS = "(?i:ca|figs?|prop|nos?|art|bldg|prop|pp|op)"
_STARTS = (
    "About According Additionally After An A As At But Earlier He Her Here However If In It Last Many More Mr\\. Ms\\. "
    "Now Once One Other Our She Since So Some Such That The Their Then There These They This We When While What Yet You"
)
_ENDS_SENTENCE = "|".join(_STARTS.split())
_URL_END = r"[^ \t\n\f\r\"<>|.!?(){},-]"


def _abbreviations() -> str:
    # A letter in brackets counts in that case only, the others in either.
    parts = [re.split(r"(\[[^]]*\])", name) for name in _ABBREVIATION.split()]
    return "|".join("".join(p if p.startswith("[") else f"(?i:{p})" for p in part if p) for part in parts)


def _brackets(text: str) -> str:
    return text.replace("(", "-lrb-").replace(")", "-rrb-")


def _joined(text: str) -> str:
    return text.replace(" ", NBSP)


def _entity(text: str) -> str:
    return text.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")


def _latex_quotes(text: str) -> str:
    return text.replace("&apos;", "'").translate(_LATEX)


def _quotes(text: str) -> str:
    return re.sub("[\x92\u2019]|&apos;", "'", re.sub("[\x91\u2018\u201b]", "`", text))


def _rule(token: str, then: str = "", make: Callable[[str], str] = str, keep: int | None = None) -> LexerRule:
    return LexerRule(re.compile(f"({token}){f'(?:{then})' if then else ''}"), make, keep)


RULES = (
    _rule(r"[cC]\+\+|[cCfF]#"),
    _rule("(?i:cannot|'twas)", keep=3),
    _rule(f"(?i:{_APOS}tis|gonna|gotta|lemme|gimme|wanna)", keep=2),
    _rule(r"</?[A-Za-z!?][^<>\r\n]*>", make=_joined),
    _rule("[\u2013\u2014\u2015\x96\x97]|&(?:MD|mdash|ndash);", make=lambda text: "--"),
    _rule("&amp;", make=_entity),
    _rule(_WORD, _AUXILIARY),
    _rule("[A-Za-z]*[A-MO-Za-mo-z]", f"[nN]{_APOS_WIDE}[tT]"),
    _rule(_WORD),
    _rule(_APOSTROPHE_WORD, make=_quotes),
    _rule(f"[yY]{_APOS}", _LETTER),
    _rule(r"(?i:https?|ftp)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|.!?(){},-]"),
    _rule(
        r"(?:www\.(?:[^ \t\n\f\r\"<>|.!?(){},]+\.)+[a-zA-Z]{2,4}|"
        r"(?:[^ \t\n\f\r\"`'<>|.!?(){},-_$]+\.)+(?:com|net|org|edu))(?:/[^ \t\n\f\r\"<>|()]+" + _URL_END + ")?"
    ),
    _rule(
        r"(?:&lt;|<)?[a-zA-Z0-9][^ \t\n\f\r\"<>|()\u00a0{}]*@"
        r"(?:[^ \t\n\f\r\"<>|(){}.\u00a0]+\.)*[^ \t\n\f\r\"<>|(){}.\u00a0]+>?"
    ),
    _rule(rf"@[a-zA-Z_][a-zA-Z_0-9]*|#{_LETTER}+"),
    _rule(_AUXILIARY, "[^A-Za-z]|$", _quotes),
    _rule(f"[nN]{_APOS_WIDE}[tT]", "[^A-Za-z]|$", _quotes),
    _rule(rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),
    _rule(_NUMBER),
    _rule("[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)"),
    _rule(rf"(?:{_DIGIT}{{1,4}}[- \u00a0])?{_DIGIT}{{1,4}}(?:\\?/|⁄){_DIGIT}{{1,4}}", make=_joined),
    _rule("[¼½¾⅓-⅞]", make=lambda text: _FRACTIONS.get(text, text)),
    _rule(_SLASHED),
    _rule(r"[A-Z]*\$|#"),
    _rule("[¢£¤¥\x80₠€₤]", make=lambda text: _CURRENCY.get(text, text)),
    _rule("[A-Za-z]", rf"\. +(?:{_ENDS_SENTENCE})(?:[ ?!]|$)"),
    _rule(rf"{_BEFORE_NUMBERS}\.", " ?[0-9]"),
    _rule(rf"(?:{_abbreviations()}|[v]|{_ACRO})\."),
    _rule(f"{_APOS}[0-9][0-9]", r"\s|$"),
    _rule("°[CF]"),
    _rule(rf"{_WORD}\.", "[,;:]"),
    _rule(
        r"\([0-9]{2,3}\) ?[0-9]{3,4}[- ]?[0-9]{3,5}|(?:\+\+?)?(?:[0-9]{2,4}[- ])?[0-9]{2,4}[- ][0-9]{3,4}"
        r"[- ]?[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}",
        make=lambda text: _joined(_brackets(text)),
    ),
    _rule("\"|&quot;|[`'\x91\x92\u2018\u2019]'", make=lambda text: "''"),
    _rule("<|&lt;", make=lambda text: "<"),
    _rule(">|&gt;", make=lambda text: ">"),
    _rule(r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]]", "[^A-Za-z0-9]|$", make=_brackets),
    _rule(r"[][(){}]", make=_BRACKETS.__getitem__),
    _rule("-+", make=lambda text: "--" if len(text) in (3, 4) else text),
    _rule(r"\.[ \u00a0](?:\.[ \u00a0])+\.", make=lambda text: "..."),
    _rule("\\.\\.\\.+|[\x85\u2026]", make=lambda text: "..."),
    _rule(r"@+|#+|_+|\*+"),
    _rule("[,;:\u3001]"),
    _rule("[?!]+"),
    _rule("[.¡¿\u3002]"),
    _rule("[=/]"),
    _rule(_HTHING),
    _rule(rf"{_HTHING}\.", "[,;:]"),
    _rule(rf"{_THING}\.", "[,;:]", _quotes),
    _rule(_THING, make=_quotes),
    _rule(rf"{_JOINED}\.", "[,;:]", make=_entity),
    _rule(_JOINED, make=_entity),
    _rule("'", r"[A-Za-z][^ \t\n\r\u00a0]"),
    _rule(f"[`\u2018-\u201f\x91-\x94\u2039\u203a«»]{{1,2}}|{_APOS}", make=_latex_quotes),
    _rule("<<|>>"),
    _rule(f"[+%&~^|\\\\¦§¨©¬®¯°±´-º×÷•†‡‰™{_SYMBOLS}]"),
)


def _of_ascii(rule: LexerRule) -> LexerRule:
    pattern = rule.pattern.pattern.replace(_LETTER, "[a-zA-Z]").replace(_PLAIN_LETTER, "[a-zA-Z]")
    return replace(rule, pattern=re.compile(pattern.replace(_DIGIT, "[0-9]")))


ASCII_RULES = tuple(map(_of_ascii, RULES))
"""The same rules where only ASCII follows, which is nearly everywhere in captions; there they are faster."""


def ptb_tokenize(text: str) -> list[str]:
    """Return lower-case tokens of one caption, punctuation marks included."""
    # No rule looks back, so what follows the last other character is a text of ASCII.
    beyond_ascii = 0 if text.isascii() else max(place for place, mark in enumerate(text, 1) if not mark.isascii())
    tokens: list[str] = []
    position = 0
    while position < len(text):
        if space := _PASSED_OVER.match(text, position):
            position = space.end()
            continue
        if (plain := _PLAIN.match(text, position)) and plain[0] not in _SPECIAL:
            tokens.append(plain[0])
            position = plain.end()
            continue
        best, rule = _longest(text, position, RULES if position < beyond_ascii else ASCII_RULES)
        if best is None or rule is None:
            position += 1
            continue
        end = best.end(1) - (rule.keep or 0)
        token = rule.make(text[position:end]).lower()
        tokens.append(token if SOFT_HYPHEN not in token else token.replace(SOFT_HYPHEN, "") or "-")
        position = end
    return tokens


def _longest(text: str, position: int, rules: Sequence[LexerRule]) -> tuple[re.Match[str] | None, LexerRule | None]:
    best: re.Match[str] | None = None
    chosen: LexerRule | None = None
    for rule in rules:
        match = rule.pattern.match(text, position)
        if match and (best is None or match.end() > best.end()):
            best, chosen = match, rule
    return best, chosen


@lru_cache(maxsize=200_000)
def caption_words(caption: str) -> str:
    """Return the words of a caption that count for its scores, joined by spaces."""
    return " ".join(token for token in ptb_tokenize(caption.replace("\n", " ")) if token not in REMOVED)
