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
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Single tokens that the caption scorers leave out, besides the upper-case brackets that never occur."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_CURRENCY = {"¢": "cents", "£": "#", "¤": "$", "€": "$", "\x80": "$", "₠": "$"}
_FRACTIONS = {"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_PASSED_OVER = re.compile(r"[ \t\r\n\f\v\u00a0\u1680\u180e\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
_PLAIN = re.compile(r"[a-z]+(?=[ ,;]|$)")  # a word that only _SPECIAL may split
_SPECIAL = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
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
_LETTER = r"(?:(?![\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u218b\u2460-\u24ff])[^\W\d_])"
_DIGIT = r"\d"
_ALNUM = f"(?:{_LETTER}|[0-9])"
_WORD = rf"{_LETTER}(?:{_LETTER}|\d)*(?:[.!?]{_LETTER}(?:{_LETTER}|\d)*)*"
_NUM = rf"(?:{_DIGIT}*(?:[.:,]{_DIGIT}+)+|{_DIGIT}+(?:[.:,]{_DIGIT}+)*)"
_NUMBER = rf"(?:[-+]?{_NUM})"
_AUXILIARY = f"{_APOS}(?:[msdMSD]|(?i:re|ve|ll))"
_HYPHEN = "[-_\u058a\u2010\u2011]"
_ACRO = r"(?:[A-Za-z](?:\.[A-Za-z])*|(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R)))"
_ACRO2 = _ACRO.replace(r"\.[A-Za-z])*", r"\.[A-Za-z])+", 1)
_FRENCH = f"[dDoOlL]{_APOS_WIDE}"
_THING = rf"(?:{_FRENCH}{_ALNUM})?{_ALNUM}+(?:{_HYPHEN}(?:{_FRENCH}{_ALNUM})?{_ALNUM}+)*"
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
    _rule("[¢£¤¥\x80₠₪€₤]", make=lambda text: _CURRENCY.get(text, text)),
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
    _rule("=+|/"),
    _rule(_HTHING),
    _rule(rf"{_HTHING}\.", "[,;:]"),
    _rule(rf"{_THING}\.", "[,;:]", _quotes),
    _rule(_THING, make=_quotes),
    _rule(rf"{_JOINED}\.", "[,;:]", make=_entity),
    _rule(_JOINED, make=_entity),
    _rule("'", r"[A-Za-z][^ \t\n\r\u00a0]"),
    _rule(f"{_APOS}|[`\u2018-\u201f\x82\x84\x91-\x94\u2039\u203a«»]{{1,2}}", make=lambda text: "'"),
    _rule("[+%&~^|\\\\¦§¨©¬®¯°±´-º×÷•†‡‰™]"),
)


def ptb_tokenize(text: str) -> list[str]:
    """Return lower-case tokens of one caption, punctuation marks included."""
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
        best, rule = _longest(text, position)
        if best is None or rule is None:
            position += 1
            continue
        end = best.end(1) - (rule.keep or 0)
        tokens.append(rule.make(text[position:end]).lower())
        position = end
    return tokens


def _longest(text: str, position: int) -> tuple[re.Match[str] | None, LexerRule | None]:
    best: re.Match[str] | None = None
    chosen: LexerRule | None = None
    for rule in RULES:
        match = rule.pattern.match(text, position)
        if match and (best is None or match.end() > best.end()):
            best, chosen = match, rule
    return best, chosen


@lru_cache(maxsize=200_000)
def caption_words(caption: str) -> str:
    """Return the words of a caption that count for its scores, joined by spaces."""
    return " ".join(token for token in ptb_tokenize(caption.replace("\n", " ")) if token not in REMOVED)
