// Figures as people read them. null and undefined: there is none.

export const NONE = "–";

const counts = new Intl.NumberFormat("en");

export const count = (value) => (value === null || value === undefined ? NONE : counts.format(Math.round(value)));

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0 s";
  if (value < 0.01) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 1) return `${Math.round(value * 1000)} ms`;
  if (value < 100) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  return age(value);
}

export function age(value) {
  if (value < 60) return `${value.toFixed(1)} s`;
  if (value < 3600) return `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`;
  return `${Math.floor(value / 3600)} h ${Math.floor((value % 3600) / 60)} min`;
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) {
    value /= 1024;
    at += 1;
  }
  return `${at && value < 100 ? value.toFixed(1) : Math.round(value)} ${units[at]}`;
}

export function share(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return NONE;
  const percent = value * 100;
  return `${percent < 100 && percent >= 99.5 ? percent.toFixed(1) : Math.round(percent)}%`;
}

export function rate(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  return value < 10 ? value.toFixed(value < 1 ? 2 : 1) : count(value);
}

export const clock = (date) => date.toLocaleTimeString("en-GB");
export const short = (id) => (id.length > 14 ? `${id.slice(0, 12)}…` : id);
