"""BABILong's prompts of qa1 to qa5 (arXiv 2406.10149), to the letter: instruction, examples, form of the answer."""

from __future__ import annotations

from dataclasses import dataclass

TEMPLATE = "{instruction}\n{examples}\n{form}\n<context>\n"
"""What comes before the context; after it, `AFTER` and the question."""
AFTER = "\n</context>\nQuestion: "


@dataclass(frozen=True)
class Prompt:
    instruction: str
    examples: tuple[str, ...]
    """Each with its answer."""
    form: str
    between: str = "\n"
    """The examples."""

    @property
    def before(self) -> str:
        """All of the prompt that stands before the context."""
        examples = self.between.join(f"<example>\n{example}\n</example>" for example in self.examples)
        return TEMPLATE.format(instruction=self.instruction, examples=examples, form=self.form)


_FACTS_ALONE = "You need to answer the question based only on the information from the facts."
_ITEMS = (
    "If a person got an item in the first location and travelled to the second location the item is also in the second "
    "location. If a person dropped an item in the first location and moved to the second location the item remains in "
    "the first location"
)

PROMPTS = {
    1: Prompt(
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        f"question. {_FACTS_ALONE} If a person was in different locations, use the latest location to answer the "
        "question.",
        (
            "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. Where is "
            "Charlie?\nAnswer: The most recent location of Charlie is balcony.",
            "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to balcony. "
            "Where is Alan?\nAnswer: The most recent location of Alan is shop.",
        ),
        "Always return your answer in the following format: The most recent location of ’person’ is ’location’. Do not "
        "write anything else after that. ",
        between="\n\n",
    ),
    2: Prompt(
        "I give you context with the facts about locations and actions of different persons hidden in some random text "
        f"and a question.{_FACTS_ALONE}\n{_ITEMS}.",
        (
            "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the bottle?\n"
            "Answer: The bottle is in the balcony.",
            "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw driver?\n"
            "Answer: The screw driver is in the kitchen.",
        ),
        "Always return your answer in the following format: The ’item’ is in ’location’. Do not write anything else "
        "after that.",
    ),
    3: Prompt(
        "I give you context with the facts about locations and actions of different persons hidden in some random text "
        f"and a question. {_FACTS_ALONE}\n{_ITEMS}",
        (
            "John journeyed to the bedroom.Mary grabbed the apple. Mary went back to the bathroom. Daniel journeyed to "
            "the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the apple before the "
            "kitchen?\nAnswer: Before the kitchen the apple was in the bathroom.",
            "John went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra took "
            "the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the football "
            "before the bedroom?\nAnswer: Before the kitchen the football was in the garden.",
        ),
        "Always return your answer in the following format: Before the $location_1& the $item$ was in the "
        "$location_2$. Do not write anything else after that.",
    ),
    4: Prompt(
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        f"random text and a question. {_FACTS_ALONE}",
        (
            "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is the kitchen south of?\n"
            "Answer: bedroom",
            "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?\n"
            "Answer: garden",
        ),
        "Your answer should contain only one word - location. Do not write anything else after that.",
    ),
    5: Prompt(
        "I will give you context with the facts about locations and their relations hidden in some random text and a "
        f"question. {_FACTS_ALONE}",
        (
            "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took the "
            "milk there. Who did Mary give the apple to?\nAnswer: Fred",
            "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill travelled "
            "to the bedroom. Who gave the football?\nAnswer: Jeff",
            "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff went "
            "back to the garden. What did Fred give to Bill?\nAnswer: apple",
        ),
        "Your answer should contain only one word. Do not write anything else after that. Do not explain your answer.",
    ),
}
