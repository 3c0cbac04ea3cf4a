"""Words for names in synthetic tasks."""

from __future__ import annotations

NOUNS = tuple(
    "anchor apple arrow basket bell bottle bridge button camel candle canyon carpet castle cedar chair clover "
    "coffee copper coral cotton desert dolphin dragon drum eagle engine falcon feather fiddle forest fox "
    "garden ginger glove guitar hammer harbor helmet hornet island jacket jungle kettle kite ladder lantern "
    "lemon lizard magnet maple marble meadow mirror nickel ocean olive onion orchid otter paper parrot pearl "
    "pencil pepper piano pigeon pillow pirate planet pocket prairie pumpkin puzzle quartz rabbit ribbon river "
    "rocket saddle salmon shadow silver spider statue stone sugar sunset sword table temple thunder tiger "
    "timber tulip tunnel turtle valley velvet violin walnut whale willow window winter wizard yogurt zebra".split()
)
"""Everyday nouns, each different in its first letters."""

ADJECTIVES = tuple(
    "able bold brave brief bright broad busy calm careful cheap clean clever cold curious dark deep distant "
    "dry eager early fair famous fast fierce fine firm flat fresh full gentle gifted glad golden grand green "
    "happy heavy helpful hollow honest humble keen kind large late lazy light lively long loud lucky mighty "
    "modern narrow neat noble odd patient plain polite proud quick quiet rapid rare ready rich rough round "
    "royal sad sharp shy silent simple slim slow small smooth soft solid steady steep strict strong sturdy "
    "sudden sweet swift tall tame thick tidy tiny tough useful vast warm wide wild wise young".split()
)

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_SYLLABLES = [consonant + vowel for vowel in _VOWELS for consonant in _CONSONANTS]
CODED_WORDS = len(_SYLLABLES) ** 2


def coded_word(number: int) -> str:
    """Word `number` of 4,900 that mean nothing: two syllables, such as `bada` or `riko`."""
    first, second = divmod(number, len(_SYLLABLES))
    return _SYLLABLES[second] + _SYLLABLES[first]
