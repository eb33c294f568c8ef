// Light or dark. Loaded before the page is drawn, and not as a module, so that a stored choice never flashes in the
// colours of the other.
"use strict";

(() => {
  const STORED = "llmdrop-theme";
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const systemTheme = () => (systemDark.matches ? "dark" : "light");
  const currentTheme = () => root.dataset.theme ?? systemTheme();

  const stored = localStorage.getItem(STORED);
  if (stored === "light" || stored === "dark") root.dataset.theme = stored;

  document.addEventListener("DOMContentLoaded", () => {
    const toggle = document.getElementById("theme");
    const show = () => toggle.setAttribute("aria-pressed", String(currentTheme() === "dark"));
    toggle.addEventListener("click", () => {
      const wanted = currentTheme() === "dark" ? "light" : "dark";
      // Back at the system's own choice, the page follows the system again.
      if (wanted === systemTheme()) {
        delete root.dataset.theme;
        localStorage.removeItem(STORED);
      } else {
        root.dataset.theme = wanted;
        localStorage.setItem(STORED, wanted);
      }
      show();
    });
    systemDark.addEventListener("change", show);
    show();
  });
})();
