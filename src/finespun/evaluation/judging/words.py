"""What an annotator's pages say, in English and Chinese."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Language = Literal["en", "zh"]

NAMES: dict[Language, str] = {"en": "English", "zh": "中文"}
"""Each language in itself, as the switch shows it."""

WORDS: dict[Language, dict[str, str]] = {
    "en": {
        "title": "Judging texts",
        "begin": "Begin",
        "item": "Item {} of {}",
        "practice": "Practice {} of {}",
        "instructions": "Instructions",
        "prompt": "Prompt",
        "text": "Text {}",
        "nothing": "(nothing)",
        "user": "User",
        "assistant": "Assistant",
        "system": "System",
        "tool": "Tool",
        "which": "Which text is better?",
        "first": "Text 1 is better",
        "second": "Text 2 is better",
        "tie": "Equally good",
        "bad": "Both are bad",
        "order": "Choose the texts from best to worst",
        "rank": "Place",
        "start_over": "Start over",
        "rate": "How good is the text?",
        "save": "Save and go on",
        "comment": "Comment (if you like)",
        "mark": "Mark as an error",
        "mark_hint": "To mark an error, select words in a text. A click on a mark removes it.",
        "undo": "Undo the last answer",
        "changed": "You are changing this answer.",
        "already": "That item had an answer already; the first one counts. Undo it if you want another.",
        "practice_right": "That is right.",
        "practice_wrong": "Look again: that is not what was expected.",
        "practice_pairs": "Text {} is better.",
        "practice_rating": "This text deserves low marks.",
        "practice_why": "The words of the other text are in random order.",
        "practice_why_rating": "Its words are in random order.",
        "sending": "Saving …",
        "waiting": "The server does not answer. Your answer is kept on this page and sent again until it is saved.",
        "refused": "The answer could not be taken. Load the page again.",
        "incomplete": "Something is missing: answer each question.",
        "done": "All done. Thank you!",
        "done_more": "Your answers are saved. You can close this page.",
        "nothing_to_do": "There is nothing to judge for this link.",
        "missing": "There is no such page",
        "missing_more": "Please open the personal link that you were given, whole.",
        "language": "Language",
        "shortcuts": "Keys",
        "shortcuts_pairs": "1 2 3 4 answer · ← → choose, Enter takes it",
        "shortcuts_ranking": "1 2 3 … give the next place · Backspace takes it back · Enter saves",
        "shortcuts_rating": "1 2 3 … give a mark · ↑ ↓ change it · Enter saves",
        "shortcuts_all": "E mark an error (← → word, Shift more words, ↑ ↓ text, Enter marks, Backspace unmarks, "
        "Esc ends) · C comment · U undo",
        "intro_pairs": "You will see a prompt and two texts that were written for it. Read both, then say which one is "
        "better. If neither is better, say whether they are equally good, or both bad.",
        "intro_ranking": "You will see a prompt and several texts that were written for it. Read all of them, then "
        "order "
        "them from best to worst.",
        "intro_rating": "You will see a prompt and a text that was written for it. Read it, then give it a mark for "
        "each "
        "question.",
        "intro_more": "The first items are for practice. Judge by the text alone, and take the time that you need: "
        "each "
        "answer is saved at once, and you can stop at any time and go on with the same link, on this device or "
        "another. "
        "Some items check that people read with care.",
    },
    "zh": {
        "title": "文本评价",
        "begin": "开始",
        "item": "第 {} 题，共 {} 题",
        "practice": "练习 {}/{}",
        "instructions": "说明",
        "prompt": "提示",
        "text": "文本 {}",
        "nothing": "（空）",
        "user": "用户",
        "assistant": "助手",
        "system": "系统",
        "tool": "工具",
        "which": "哪个文本更好？",
        "first": "文本 1 更好",
        "second": "文本 2 更好",
        "tie": "一样好",
        "bad": "都不好",
        "order": "请从最好到最差依次选择文本",
        "rank": "名次",
        "start_over": "重新排序",
        "rate": "这个文本怎么样？",
        "save": "保存并继续",
        "comment": "备注（可不填）",
        "mark": "标为错误",
        "mark_hint": "要标出错误，请选中文本中的字词；点击标记可将其删除。",
        "undo": "撤销上一个答案",
        "changed": "您正在修改这个答案。",
        "already": "该题已有答案，以第一次的为准。如需更改，请先撤销。",
        "practice_right": "正确。",
        "practice_wrong": "请再看看：这与预期的答案不同。",
        "practice_pairs": "文本 {} 更好。",
        "practice_rating": "这个文本应得低分。",
        "practice_why": "另一个文本的词序被打乱了。",
        "practice_why_rating": "它的词序被打乱了。",
        "sending": "正在保存……",
        "waiting": "服务器没有响应。您的答案保留在本页，并会不断重发，直到保存成功。",
        "refused": "无法接受这个答案，请重新加载页面。",
        "incomplete": "还有未回答的问题，请逐一作答。",
        "done": "全部完成，谢谢！",
        "done_more": "您的答案已保存，可以关闭本页。",
        "nothing_to_do": "此链接没有需要评价的内容。",
        "missing": "没有这个页面",
        "missing_more": "请完整打开您收到的个人链接。",
        "language": "语言",
        "shortcuts": "按键",
        "shortcuts_pairs": "1 2 3 4 作答 · ← → 选择，回车确认",
        "shortcuts_ranking": "1 2 3 … 依次排名 · 退格键撤回 · 回车保存",
        "shortcuts_rating": "1 2 3 … 打分 · ↑ ↓ 更改 · 回车保存",
        "shortcuts_all": "E 标记错误（← → 移动，Shift 扩选，↑ ↓ 换文本，回车标记，退格取消，"
        "Esc 结束） · C 备注 · U 撤销",
        "intro_pairs": "您将看到一个提示，以及根据它写成的两个文本。请都读完，再选出更好的一个。如果不分高下，请说明"
        "是一样好，还是都不好。",
        "intro_ranking": "您将看到一个提示，以及根据它写成的几个文本。请全部读完，再从最好到最差排序。",
        "intro_rating": "您将看到一个提示，以及根据它写成的一个文本。请读完，再就每个问题打分。",
        "intro_more": "开头几题是练习。请只根据文本本身判断，时间不限：每个答案都会立即保存，您可以随时停下，之后在"
        "本设备或其他设备上用同一链接继续。"
        "有些题目用来检查是否认真阅读。",
    },
}


def preferred(accept: str) -> Language:
    """The language that a browser's `Accept-Language` puts first among those there are; English where it names none."""
    wanted: list[tuple[float, int, Language]] = []
    for place, part in enumerate(accept.split(",")):
        tag, _, parameters = part.strip().partition(";")
        primary = tag.strip().lower().partition("-")[0]
        try:
            weight = float(parameters.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        wanted += [(-weight, place, language) for language in NAMES if language == primary and weight > 0]
    return min(wanted)[2] if wanted else "en"


def told(words: Mapping[str, str], language: Language) -> str:
    """`words` in `language`, or in English where they are known in it only."""
    return words.get(language, words["en"])
