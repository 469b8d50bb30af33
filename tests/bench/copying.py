"""Tasks whose answers copy most of their prompts, as edits, extractions and reports do; and some that copy nothing."""

from __future__ import annotations

from collections.abc import Sequence

_ARTICLE = (
    "The lighthouse at Cape Orme was built in 1871 from granite that was quarried on the island itself. For ninety"
    " years its keeper climbed 214 steps each evening to light the lamp, and climbed them again at midnight to wind the"
    " clock that turned the lens. In 1961 the lamp was made electric, and the last keeper, Agnes Tolland, moved to the"
    " village. She came back every spring to paint the railings white."
)
_CODE = '''def total_price(items, discount):
    """Return the price of all items after the discount."""
    total = 0
    for item in items:
        price = item["price"] * item["quantity"]
        if item["on_sale"]:
            price = price * (1 - discount)
        total = total + price
    return round(total, 2)'''
_RECORDS = """{"name": "Ada", "age": 36, "city": "London", "active": true}
{"name": "Linus", "age": 28, "city": "Helsinki", "active": true}
{"name": "Grace", "age": 45, "city": "New York", "active": false}
{"name": "Edsger", "age": 41, "city": "Rotterdam", "active": true}
{"name": "Barbara", "age": 33, "city": "Boston", "active": false}"""
_LETTER = (
    "Dear Mr. Hale, thank you for your letter of 3 March. The parts that you ordered left our warehouse on Monday and"
    " should reach you by the end of the week. If anything is missing, please write to us and we will send it again at"
    " once, without any cost to you. We are sorry for the delay and hope to hear from you again. Yours, Ellen Marsh"
)
_RECIPE = (
    "Mix 500 g of flour with 10 g of salt and 3 g of yeast. Add 350 ml of warm water and stir until no dry flour is"
    " left. Cover the bowl and let the dough rest for twelve hours. Shape it into a ball on a floured board, let it"
    " rise for another hour, and bake it in a hot iron pot: thirty minutes with the lid on, fifteen without. Let it"
    " cool on a rack before you cut it."
)

COPYING: Sequence[str] = (
    f"Repeat this text word for word:\n\n{_ARTICLE}",
    f"Write this code again, with the same names and comments:\n\n{_CODE}",
    f"Repeat these records, one a line, exactly as they are:\n\n{_RECORDS}",
    f"Copy this letter word for word, and then stop:\n\n{_LETTER}",
    f"Repeat this recipe word for word:\n\n{_RECIPE}",
    f"Here is a function:\n\n{_CODE}\n\nWrite the whole function again, and rename total_price to sum_of_prices.",
    f"{_ARTICLE}\n\nRepeat the text above word for word.",
    f"{_LETTER}\n\nCopy the letter above word for word, but address it to Mrs. Stone.",
)

FREE: Sequence[str] = (
    "Tell me a story about a clockmaker who lost his hearing.",
    "Why is the sky blue? Explain it to a child.",
    "Write a poem about a river in winter.",
    "What should I think of when I buy a used bicycle?",
    "Describe a morning in a small harbour town.",
    "Explain how bread rises.",
    "Give me advice on how to learn to play chess.",
    "Write a letter to a friend who has moved abroad.",
)
