// Candidates to detections, as the manifest's post-processing says it, and how far two sets of detections are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "heads.hpp"
#include "release.hpp"

namespace detections {

using release::Detection;

constexpr std::size_t max_candidates = 30000;

// `output0`, `[4 + nc, A]`, as columns.
inline heads::Candidates columns_of(const std::vector<float>& output, std::size_t rows, std::size_t count) {
  heads::Candidates columns(count, std::vector<float>(rows));
  for (std::size_t row = 0; row < rows; ++row)
    for (std::size_t i = 0; i < count; ++i) columns[i][row] = output[row * count + i];
  return columns;
}

// The intersection over the union of two boxes; NaN where neither has an area.
inline double overlap(const Detection& a, const Detection& b) {
  const double width = std::min<double>(a.x2, b.x2) - std::max<double>(a.x1, b.x1);
  const double height = std::min<double>(a.y2, b.y2) - std::max<double>(a.y1, b.y1);
  const double both = std::max(width, 0.0) * std::max(height, 0.0);
  const auto area = [](const Detection& d) { return (double(d.x2) - d.x1) * (double(d.y2) - d.y1); };
  return both / (area(a) + area(b) - both);
}

// Greedy suppression class by class; candidates come best first, equal scores by class, then by anchor.
inline std::vector<Detection> suppress(const std::vector<Detection>& candidates, double iou, std::size_t max_det) {
  std::vector<Detection> kept;
  for (const auto& candidate : candidates) {
    if (kept.size() == max_det) break;
    const bool rivals = std::any_of(kept.begin(), kept.end(), [&](const Detection& better) {
      return better.label == candidate.label && overlap(better, candidate) > iou;
    });
    if (!rivals) kept.push_back(candidate);
  }
  return kept;
}

inline std::vector<Detection> decode(const heads::Candidates& columns, const release::Postprocessing& post) {
  std::vector<Detection> found;
  const auto add = [&](const std::vector<float>& c, std::size_t name) {
    const float w = c[2] / 2, h = c[3] / 2;
    found.push_back({c[0] - w, c[1] - h, c[0] + w, c[1] + h, c[4 + name], static_cast<int>(name)});
  };
  const std::size_t names = columns.empty() ? 0 : columns.front().size() - 4;
  if (post.multi_label) {
    for (std::size_t name = 0; name < names; ++name)
      for (const auto& column : columns)
        if (column[4 + name] > post.conf) add(column, name);
  } else {
    for (const auto& column : columns) {
      const auto best = std::max_element(column.begin() + 4, column.end());
      if (*best > post.conf) add(column, best - column.begin() - 4);
    }
  }
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.score > b.score; });
  if (found.size() > max_candidates) found.resize(max_candidates);
  return suppress(found, post.iou, post.max_det);
}

// Rows of x1, y1, x2, y2, score, class of a head that needs no suppression.
inline std::vector<Detection> decode_end_to_end(const std::vector<float>& output, const release::Postprocessing& post) {
  std::vector<Detection> found;
  for (std::size_t i = 0; i + 6 <= output.size(); i += 6)
    if (const float* row = &output[i]; row[4] > post.conf)
      found.push_back({row[0], row[1], row[2], row[3], row[4], static_cast<int>(row[5])});
  std::stable_sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.score > b.score; });
  if (found.size() > post.max_det) found.resize(post.max_det);
  return found;
}

// The largest relative error and difference of scores, the smallest IoU.
struct Difference {
  double relative_error = 0, score = 0, iou = 1;

  void worsen(const Difference& other) {
    relative_error = std::max(relative_error, other.relative_error);
    score = std::max(score, other.score);
    iou = std::min(iou, other.iou);
  }
  bool within(const release::Tolerance& allowed) const {
    return relative_error <= allowed.relative_error && score <= allowed.score && iou >= allowed.iou;
  }
};

// `||found - values|| / ||values||` at the golden places; infinite where something is not finite.
inline double relative_error(const std::vector<float>& found, const release::GoldenOutput& golden) {
  double distance = 0, scale = 0;
  for (std::size_t i = 0; i < golden.values.size(); ++i) {
    const double expected = golden.values[i], off = found[golden.indices[i]] - expected;
    distance += off * off;
    scale += expected * expected;
  }
  if (!std::isfinite(distance)) return INFINITY;
  return scale > 0 ? std::sqrt(distance / scale) : (distance > 0 ? INFINITY : 0);
}

// Each of the first `compared` of `wanted` looks for a partner of its class.
inline Difference find_partners(const std::vector<Detection>& candidates, const std::vector<Detection>& wanted,
                                std::size_t compared) {
  Difference worst;
  for (std::size_t i = 0; i < std::min(compared, wanted.size()); ++i) {
    const Detection& row = wanted[i];
    const Detection* partner = nullptr;
    double best = 0;
    for (const auto& other : candidates) {
      const bool equal = other.x1 == row.x1 && other.y1 == row.y1 && other.x2 == row.x2 && other.y2 == row.y2;
      const double iou = equal ? 1 : overlap(row, other);  // equal boxes may have no area
      if (other.label == row.label && iou > best) best = iou, partner = &other;
    }
    if (!partner) return {0, 1, 0};
    worst.worsen({0, std::abs(double(partner->score) - row.score), best});
  }
  return worst;
}

inline Difference compare(const std::vector<Detection>& found, const std::vector<Detection>& golden,
                          std::size_t compared) {
  Difference worst = find_partners(found, golden, compared);
  worst.worsen(find_partners(golden, found, compared));
  return worst;
}

}  // namespace detections
