"use strict";

const $ = (id) => document.getElementById(id);
const BYTES = ["bytes", "kB", "MB"];

function complain(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function button(name, label, act) {
  const made = element("button", name);
  made.type = "button";
  made.title = label;
  made.setAttribute("aria-label", label);
  made.addEventListener("click", act);
  return made;
}

function bytes(count) {
  const power = Math.min(BYTES.length - 1, Math.floor(Math.log10(Math.max(1, count)) / 3));
  return `${(count / 1000 ** power).toFixed(power === 2 ? 1 : 0)} ${BYTES[power]}`;
}

function seconds(milliseconds) {
  return `${(milliseconds / 1000).toFixed(2)} s`;
}
