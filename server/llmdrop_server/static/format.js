// Numbers as people read them. A missing number is a dash, never a zero.

export const NONE = "–";

const wholeNumber = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const oneDecimal = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const threeDigits = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });

export const formatCount = (value) => (value == null ? NONE : wholeNumber.format(value));
export const formatDecimal = (value) => (value == null ? NONE : oneDecimal.format(value));
export const formatShare = (share) => (share == null ? NONE : `${oneDecimal.format(share * 100)}%`);
export const formatBytes = (bytes) => (bytes == null ? NONE : `${wholeNumber.format(bytes)} B`);

/** Of weights, in millions of bytes. */
export const formatMegabytes = (bytes) => `${wholeNumber.format(bytes / 1e6)} MB`;

/** Three digits are as many as a rate measured over seconds deserves; above 1,000 the units are shown. */
export function formatRate(perSecond) {
  return (perSecond >= 1000 ? wholeNumber : threeDigits).format(perSecond);
}

export function formatSeconds(seconds) {
  if (seconds == null) return NONE;
  if (seconds < 1) return `${threeDigits.format(seconds * 1000)} ms`;
  return `${threeDigits.format(seconds)} s`;
}

/** What `served` is of `full`, as a change: "−33.3%". */
export function formatChange(full, served) {
  if (full === served) return "no change";
  const sign = served < full ? "−" : "+";
  return `${sign}${oneDecimal.format((Math.abs(served - full) / full) * 100)}%`;
}

export function ordinal(number) {
  const suffix = { one: "st", two: "nd", few: "rd", other: "th" };
  return number + suffix[new Intl.PluralRules("en", { type: "ordinal" }).select(number)];
}

export const plural = (count, word) => `${formatCount(count)} ${word}${count === 1 ? "" : "s"}`;
