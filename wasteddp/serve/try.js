"use strict";
const byId = (id) => document.getElementById(id);
const percent = (share) => (100 * share).toFixed(1) + " %";

function line(card, tag, text, name = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = name;
  card.append(element);
}

function show(file, answer) {
  const card = document.createElement("li");
  card.className = "card";
  const image = document.createElement("img");
  image.alt = "";
  image.src = URL.createObjectURL(file);
  image.onload = image.onerror = () => URL.revokeObjectURL(image.src);
  card.append(image);
  if (answer.error) {
    line(card, "h2", "not classified", "wrong");
    line(card, "p", answer.error);
  } else {
    const bin = answer.decision ?? answer.bin;
    line(card, "h2", bin ? answer.class + " \u2192 " + bin : answer.class);
    line(card, "p", percent(answer.probability) + " sure");
    if (answer.why) line(card, "p", "to a person or another bin because of " + answer.why, "wrong");
    if (typeof answer.unlike === "number") {
      const text = "less like the training images than " + answer.unlike.toFixed(1) + " % of them";
      line(card, "p", text, answer.unlike >= {unlike_from} ? "wrong" : "");
    }
  }
  line(card, "p", file.name, "about");
  byId("answers").prepend(card);
}

async function send(file) {
  const form = new FormData();
  form.append("images", file, file.name);
  const token = byId("token").value;
  try {
    const headers = token ? { Authorization: "Bearer " + token } : {};
    const response = await fetch("predict", { method: "POST", body: form, headers });
    const content = await response.json();
    show(file, response.ok ? content.answers[0] : content);
  } catch (error) {
    show(file, { error: "no answer: " + error.message });
  }
}

async function sendAll(files) {
  const images = Array.from(files);
  for (const [number, file] of images.entries()) {
    byId("status").textContent = "photo " + (number + 1) + " of " + images.length;
    await send(file);
  }
  byId("status").textContent = "";
}

for (const id of ["choose", "camera"]) {
  byId(id).addEventListener("change", (event) => {
    sendAll(event.target.files).finally(() => { event.target.value = ""; });
  });
}
byId("form").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("paste", (event) => sendAll(event.clipboardData.files));
document.addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
document.addEventListener("dragleave", () => byId("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  byId("drop").classList.remove("over");
  sendAll(event.dataTransfer.files);
});
