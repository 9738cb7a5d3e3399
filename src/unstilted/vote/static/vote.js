// Keys for the pairs page. Everything works without this file; it only saves the hand the way to the mouse.
"use strict";

const root = document.documentElement;
const ballot = document.getElementById("ballot");
const onward = document.getElementById("go");
root.classList.add("keys");

const isMirrored = root.dir === "rtl";
const sideOfKey = { ArrowLeft: isMirrored ? "right" : "left", ArrowRight: isMirrored ? "left" : "right" };
for (const hint of document.querySelectorAll("kbd[data-side]")) {
  hint.textContent = sideOfKey.ArrowLeft === hint.dataset.side ? "←" : "→";
}

function choiceOfKey(key) {
  return sideOfKey[key] || { t: "tie", b: "both_bad" }[key.toLowerCase()];
}

// With several questions a key answers the one that has the focus, or else the first unanswered one.
function answer(choice) {
  const questions = [...ballot.querySelectorAll("fieldset")];
  const focused = questions.find((question) => question.contains(document.activeElement));
  const open = questions.find((question) => !question.querySelector("input:checked"));
  const radio = (focused || open || questions[0]).querySelector(`input[value="${choice}"]`);
  if (!radio) return;
  radio.checked = true;
  if (questions.length > 1) {
    const next = questions.find((question) => !question.querySelector("input:checked"));
    (next ? next.querySelector("input") : radio).focus();
  }
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const choice = ballot && choiceOfKey(event.key);
  if (choice) {
    answer(choice);
    event.preventDefault();
  } else if (event.key.toLowerCase() === "u" && document.getElementById("undo")) {
    document.getElementById("undo").requestSubmit();
  } else if (event.key === "Enter" && !event.repeat && !document.activeElement.closest("a, button, summary")) {
    event.preventDefault();
    if (ballot) ballot.requestSubmit();
    else if (onward) onward.click();
  }
}

// A second click on Next while the first is on its way sends nothing; the server would refuse it anyway.
function onSubmit(event) {
  const form = event.target;
  if (form.dataset.sent) event.preventDefault();
  form.dataset.sent = "yes";
}

// A click on a reply chooses it, unless the reader is marking text.
function onReplyClick(event) {
  const reply = event.target.closest(".reply");
  if (reply && String(window.getSelection()) === "") answer(reply.classList.contains("reply-left") ? "left" : "right");
}

document.addEventListener("keydown", onKey);
document.addEventListener("submit", onSubmit);
if (ballot) {
  if (ballot.querySelectorAll("fieldset").length === 1) ballot.addEventListener("click", onReplyClick);
}
window.addEventListener("pageshow", (event) => {
  if (event.persisted) window.location.reload();
});
